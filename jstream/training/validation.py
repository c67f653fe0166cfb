"""What a model in training is worth on rows that it does not learn from, with the right past before every decision.

A forward pass over whole rows gives, at every turn, what the model would decide, and for every reply how well it would
have been said. How it does when it has to live with its own decisions is what `jstream.evaluate` measures.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import StageConfig, TrainConfig
from jstream.protocols.protocol import RESPONSE, SILENCE, STATE, STATES, TEXT, StreamProtocol
from jstream.training import losses
from jstream.training.lora import beside
from jstream.training.step import Params, TrainState, computed, embed_row, head_of


@dataclasses.dataclass(frozen=True)
class Turns:
    """The turns of one dialogue, as they should be and as the model would decide.

    Attributes:
        wanted, decided: states; `judged` bool: whether training learns the decision. All [F].
        cross_entropies: of each reply that is learned, the mean over its tokens.
    """

    wanted: np.ndarray
    decided: np.ndarray
    judged: np.ndarray
    cross_entropies: list[float]


def make_validation_step(config: TrainConfig, protocol: StreamProtocol) -> Callable:
    """(state, frozen, batch) → f32 [B, T]: log p of the right tokens; f32 [B, F, …]: the scores that turns are decided
    by (`StreamProtocol.scores`)."""

    @jax.jit
    def validation_step(state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]):
        params = {**state.trained, **frozen}
        with beside(params, config.lora):
            _, hidden = embed_row(config, computed(config, params), batch)
            head = head_of(config, params)
            log_probs, _ = losses.token_scores(hidden, batch["labels"], head)
            at_decisions = jnp.take_along_axis(hidden, jnp.maximum(batch["decisions"], 0)[..., None], axis=1)
            of_frame = lambda hidden_BD: jax.vmap(protocol.scores)(head(hidden_BD))
            scores = jnp.moveaxis(jax.lax.map(of_frame, jnp.moveaxis(at_decisions, 1, 0)), 0, 1)
        return log_probs, scores

    return validation_step


READ = ("first", "decisions", "labels", "kinds", "segments")  # what `turns_of_row` needs of a row


def turns_of_row(row: Mapping[str, np.ndarray], protocol: StreamProtocol) -> list[Turns]:
    """The dialogues of one packed row.

    Args:
        row: READ as `data.rows` lays it; `log_probs` [T] and `scores` [F, …] as a validation step gives them.
    """
    decisions, scores = row["decisions"], row["scores"]
    used = int(np.sum(decisions >= 0))
    decisions = decisions[:used]
    starts = [*np.flatnonzero(row["first"][:used]), used]
    wanted = np.full(used, SILENCE)
    replied = np.zeros(used, bool)
    ends = [*decisions[1:], len(row["labels"])]
    entropies: list[list[float]] = [[] for _ in range(used)]
    for turn, (begin, end) in enumerate(zip(decisions, ends)):
        spoken = [at for at in range(begin, end) if row["kinds"][at] == TEXT and row["segments"][at] >= 0]
        replied[turn] = bool(spoken)
        if spoken:
            entropies[turn] = [float(-np.mean(row["log_probs"][spoken]))]
    judged = row["kinds"][decisions] == STATE
    order = {token: state for state, token in enumerate(protocol.decision_ids)}
    names = list(protocol.probs(list(scores[0])) if used else STATES)
    for turn in range(used):
        if judged[turn]:
            wanted[turn] = STATES.index(names[order[int(row["labels"][decisions[turn]])]])
        elif replied[turn]:
            wanted[turn] = RESPONSE
    decided = np.asarray([protocol.decide(list(score)) for score in scores[:used]])
    return [
        Turns(wanted[a:b], decided[a:b], judged[a:b], [x for turn in entropies[a:b] for x in turn])
        for a, b in zip(starts, starts[1:])
    ]


def time_differences(turns: Turns) -> list[float]:
    """By how many frames each learned response would have come too early or too late (VideoLLM-online's TimeDiff).

    Looked at are the frames since the response before; where the model is silent in all of them, those up to the next
    one. A response counts for at most as many frames as its own turn has.
    """
    said = np.flatnonzero(turns.wanted == RESPONSE)
    off = []
    for before, at, after in zip([-1, *said], said, [*said[1:], len(turns.wanted)]):
        if not turns.judged[at]:  # a question forces it
            continue
        early = np.flatnonzero(turns.decided[before + 1 : at + 1] == RESPONSE)
        late = np.flatnonzero(turns.decided[at + 1 : after] == RESPONSE)
        own = at - before
        missed = own if not len(late) else min(int(late[0]) + 1, own)
        off.append(float(own - 1 - early[0] if len(early) else missed))
    return off


def summarize(dialogues: Iterable[Turns], fps: float = 1.0) -> dict[str, float]:
    """The metrics of a validation.

    Returns:
        `state_accuracy`: of decisions. `reply_f1`: of the decision to respond. `time_diff`: seconds (mean). `ppl`: of
        replies, the mean of each one's perplexity. Those with nothing to measure are left out.
    """
    dialogues = list(dialogues)
    wanted, decided = (
        np.concatenate([getattr(d, name)[d.judged] for d in dialogues] or [np.zeros(0)])
        for name in ("wanted", "decided")
    )
    off = [value for d in dialogues for value in time_differences(d)]
    entropies = [value for d in dialogues for value in d.cross_entropies]
    responses = np.sum(wanted == RESPONSE) + np.sum(decided == RESPONSE)
    metrics: dict[str, Any] = {}
    if len(wanted):
        metrics["state_accuracy"] = np.mean(wanted == decided)
    if responses:
        metrics["reply_f1"] = 2 * np.sum((wanted == RESPONSE) & (decided == RESPONSE)) / responses
    if off:
        metrics["time_diff"] = np.mean(off) / fps
    if entropies:
        metrics["ppl"] = np.mean(np.exp(entropies))
    return {name: float(value) for name, value in metrics.items()}


def validation_stage(config: TrainConfig) -> StageConfig | None:
    """The shape of the rows of a validation: that of the last stage that trains the decoder."""
    stages = [stage for stage in config.stages if stage.tokens]
    return stages[-1] if stages else None
