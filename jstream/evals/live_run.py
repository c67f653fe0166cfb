"""The streaming metrics of VideoLLM-online of a model: it reads whole dialogues as they should be (teacher forcing).

A dialogue is one forward pass, from its frames or from what their vision tower made of them, and one more for every
reply that the model would have missed. Texts are padded to few lengths, so that few programs are compiled. What is
counted stands in `live_metrics` and in `rules_of`; models that speak another protocol than LIVE are measured alike.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from tqdm import tqdm

from jstream.config import ConfigError, ModelConfig
from jstream.data.annotations import Annotations, turns_of_annotation
from jstream.data.dialogue import DialogueError
from jstream.data.features import stored_features
from jstream.data.frames import clip_of
from jstream.data.video import VideoError
from jstream.data.video_rows import frames_said, sampled_frames
from jstream.evals.live_metrics import NOT_LEARNED, Decisions, Measured, ReplyTurn, measure_dialogue, report_of
from jstream.evals.progress import Progress
from jstream.evals.report import Report
from jstream.model import Model
from jstream.models.attention import implementation_for
from jstream.models.cache import EMPTY
from jstream.models.rope import packed_rope_positions
from jstream.models.video_lm import run
from jstream.protocols.protocol import SILENCE, STATE, TEXT, StreamProtocol, Turn
from jstream.weights.fingerprint import fingerprint
from jstream.weights.hf import flat

MAX_FRAMES = 1200  # of a dialogue: ten minutes of a chat, as VideoLLM-online reads them (`--max_num_frames`)
SHORTEST = 512  # tokens of a padded text; others are twice as long, four times, …
FRAMES_AT_ONCE = 32  # in the vision tower
LOGITS_AT_ONCE = 1 << 25  # f32 values that exist at a time: 128 MiB

_SILENT = {
    "live": "the token between frames, whose rank counts among all tokens",
    "streamo": "the state tokens of silence and of standby; a decision falls among state tokens",
    "joyai": "the state token of silence; a decision falls among state tokens",
}


def rules_of(model: Model) -> dict[str, str]:
    """What `live_metrics` leaves to the model and its protocol, in sentences."""
    height, width = model.config.vision.frame_size
    name = model.protocol.name
    return {
        "silence": f"In the protocol of this model, {name}: {_SILENT[name]}.",
        "learned": "What training learns; of a reply also its end, and in LIVE the words that open it.",
        "run on": "The further frames follow the last learned one, each behind a silent turn, without questions.",
        "frames": f"Of a dialogue the first {MAX_FRAMES} at most, {height} × {width} pixels.",
    }


# ---------------------------------------------------------------------------------------------------- one forward pass


@functools.partial(jax.jit, static_argnums=(0, 3))
def _embed(config: ModelConfig, params: Any, seen: jax.Array, method: str) -> jax.Array:
    return run(config, params, seen, method=method)


def embed(model: Model, frames: np.ndarray) -> np.ndarray:
    """Frame tokens [F, M, E].

    Args:
        frames: uint8 [F, H, W, 3], or the features of them [F, M, feature_width].
    """
    vision, parts = model.config.vision, []
    method = "embed_frames" if frames.dtype == np.uint8 else "project"
    for begin in range(0, len(frames), FRAMES_AT_ONCE):
        part = frames[begin : begin + FRAMES_AT_ONCE]
        if method == "embed_frames":
            befores = [None if i == 0 else frames[i - 1] for i in range(begin, begin + len(part))]
            part = np.stack([clip_of(*images, vision) for images in zip(part, befores)])
        else:
            part = part.astype(model.dtype)
        whole = np.pad(part, [(0, FRAMES_AT_ONCE - len(part))] + [(0, 0)] * (part.ndim - 1))
        parts.append(np.asarray(_embed(model.config, model.params, whole, method))[: len(part)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read(
    config: ModelConfig,
    scores: Any,
    frame_id: int,
    params: Any,
    tokens_T: jax.Array,
    labels_T: jax.Array,
    length: int,
    frame_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    network = functools.partial(run, config, params)
    inside = jnp.arange(len(tokens_T)) < length
    is_frame = (inside & (tokens_T == frame_id))[None]
    positions = jnp.where(inside, jnp.arange(len(tokens_T)), EMPTY)[None]
    embeds = network(tokens_T[None], is_frame, frame_tokens[None], method="embed_tokens")
    rope = packed_rope_positions(is_frame, positions, config.vision.token_grid, bool(config.decoder.mrope_section))
    kernel = implementation_for(jax.default_backend(), config.decoder.head_dim, embeds.dtype)
    segments = jnp.where(inside, 0, EMPTY)[None]
    hidden, _ = network(embeds, positions, rope, segments, method="hidden", attention=kernel)

    def score(part):
        hidden_ND, labels_N = part
        logits = network(hidden_ND, method="logits")
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels_N[:, None], axis=-1)[:, 0]
        return log_probs, jnp.argmax(logits, axis=-1), jax.vmap(scores)(logits)

    most = max(LOGITS_AT_ONCE // config.decoder.vocab_size, 128)
    block = min(len(tokens_T), 1 << (most.bit_length() - 1))  # a power of two, as the length is
    parts = jax.lax.map(score, (hidden[0].reshape(-1, block, hidden.shape[-1]), labels_T.reshape(-1, block)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), parts)


@dataclasses.dataclass(frozen=True)
class Read:
    """What a model predicts behind each token of a text.

    Attributes:
        log_probs: f32 [T]: of the label. predicted: int [T]: the most probable token.
        scores: f32 [T, …]: what a decision there would fall by (`StreamProtocol.scores`).
    """

    log_probs: np.ndarray
    predicted: np.ndarray
    scores: np.ndarray


def read(model: Model, tokens: ArrayLike, labels: ArrayLike, frame_tokens: np.ndarray) -> Read:
    """Reads a text at once.

    Args:
        tokens: [T], with placeholders of frame tokens.
        labels: [T].
        frame_tokens: [F, M, E], in the order of their placeholders.
    """
    tokens, labels, length = np.asarray(tokens, np.int32), np.asarray(labels, np.int32), SHORTEST
    while length < len(tokens):
        length *= 2
    # here, as on a device each number of tokens would be a program of its own
    padded = lambda ids: np.pad(ids, (0, length - len(ids)))
    seen = frame_tokens.reshape(-1, frame_tokens.shape[-1])
    seen = np.pad(seen, ((0, length - len(seen)), (0, 0)))  # there are no more of them than tokens
    config, protocol = model.config, model.protocol
    found = _read(
        config, protocol.scores, protocol.frame_id, model.params, padded(tokens), padded(labels), len(tokens), seen
    )
    return Read(*(np.asarray(x)[: len(tokens)] for x in found))


def decisions_of(protocol: StreamProtocol, scores: np.ndarray) -> Decisions:
    """Decisions that fall by scores [n, S]: in every protocol the last of them is for the word, the others against."""
    speaks = scores.argmax(axis=-1) == scores.shape[-1] - 1
    return Decisions(np.where(speaks, protocol.decision_ids[-1], protocol.decision_ids[0]), scores[:, :-1].sum(axis=-1))


# ---------------------------------------------------------------------------------------------------------- a dialogue


def measure(model: Model, turns: Sequence[Turn], frames: np.ndarray, threshold: float = 0.0) -> Measured:
    """Measures one dialogue.

    Args:
        turns: one a frame.
        frames: as in `embed`.
        threshold: below this probability of silence the model speaks.
    """
    protocol = model.protocol
    replied = [i for i, turn in enumerate(turns) if turn.reply is not None]
    if not replied:
        return Measured(None, None, None, None)
    turns = turns[: replied[-1] + 1]  # behind the last reply nothing is measured
    rendering, frame_tokens = protocol.render(turns), embed(model, frames[: len(turns)])
    found = read(model, rendering.tokens, rendering.labels, frame_tokens)
    is_frame = rendering.kinds == STATE
    predicted, silence = decisions_of(protocol, found.scores)
    predicted = np.where(is_frame, predicted, found.predicted)
    labels = np.where(is_frame | (rendering.kinds == TEXT), rendering.labels, NOT_LEARNED)

    of_replies = [range(before + 1, at + 1) for before, at in zip([-1, *replied], replied)]  # turns up to each
    reply_turns = []
    for of_reply in of_replies:
        tokens = slice(rendering.ends[of_reply[0] - 1] if of_reply[0] else 0, rendering.ends[of_reply[-1]])
        arrays = (x[tokens] for x in (labels, predicted, found.log_probs, silence, is_frame))
        reply_turns.append(ReplyTurn(*arrays, num_frames=len(of_reply)))

    def run_on(number: int, num_frames: int) -> Decisions:
        last = max(i for i in of_replies[number] if is_frame[rendering.decisions[i]])
        tokens, at = rendering.tokens[: rendering.decisions[last] + 1].tolist(), []
        further = of_replies[number + 1][:num_frames]
        for i in further:
            tokens += protocol.close_turn(SILENCE) + protocol.open_turn(dataclasses.replace(turns[i], query=None))
            at.append(len(tokens) - 1)
        shown = frame_tokens[[*range(last + 1), *further]]
        return decisions_of(protocol, read(model, tokens, np.zeros(len(tokens)), shown).scores[at])

    return measure_dialogue(reply_turns, protocol.decision_ids[0], run_on, threshold)


# ---------------------------------------------------------------------------------------------------------- a data set


def evaluate(
    model: Model,
    annotations: str | pathlib.Path,
    out: str | pathlib.Path,
    fps: float = 1.0,
    num_dialogues: int | None = None,
    threshold: float = 0.0,
    progress: bool = False,
) -> Report:
    """Measures a model on the dialogues of a file or a prepared folder; killed, it goes on where it was.

    Args:
        annotations: what `Annotations` opens; relative paths of videos start at its folder.
        out: folder of `progress.jsonl`, a line for each dialogue that is measured.
        fps: sampled frames a second, where the annotations do not say.
        num_dialogues: the first ones; None takes all.
        threshold: below this probability of silence the model speaks.

    Raises:
        DialogueError: the annotations cannot be read, or none of their videos.
        ConfigError: they hold features of another tower, num_dialogues is below 1, or `out` has the progress of another
            run.
    """
    if num_dialogues is not None and num_dialogues < 1:
        raise ConfigError(f"num_dialogues: expected at least 1, found {num_dialogues}")
    opened, weights = Annotations(annotations), flat(model.params)
    vision, stored = model.config.vision, stored_features(annotations)
    if stored is not None:
        stored.check(vision, stored.fps)
        own = fingerprint({path: x for path, x in weights.items() if path.startswith("vision/")})
        if own != stored.tower:
            raise ConfigError(
                f"{annotations}: expected features of the model's tower {own[:12]}, found those of "
                f"{stored.tower[:12]}; take the annotations with their videos"
            )
    settings = {"annotations": str(annotations), "fps": fps, "threshold": threshold, "frames": list(vision.frame_size)}
    keys, failed = [], {}
    with Progress(pathlib.Path(out) / "progress.jsonl", {**settings, "weights": fingerprint(weights)}) as kept:
        for index in tqdm(
            range(len(opened))[:num_dialogues], unit="dialogue", dynamic_ncols=True, disable=not progress
        ):
            annotation = opened[index]
            keys.append(f"{index}:{hashlib.sha256(json.dumps(opened.record(index)).encode()).hexdigest()[:16]}")
            if keys[-1] in kept.done:
                continue
            rate = annotation.fps or fps
            said = frames_said(annotation, rate)
            limit = MAX_FRAMES if said is None else min(said, MAX_FRAMES)
            try:
                frames = sampled_frames(opened, stored, index, vision, fps, limit)
            except (VideoError, DialogueError, OSError) as error:
                failed[keys[-1]] = f"left out: {error}"
                continue
            measured = measure(model, turns_of_annotation(annotation, len(frames), fps), frames, threshold)
            kept.add(keys[-1], {"measured": measured, "fps": rate})
        done = [kept.done[key] for key in keys if key not in failed]
    if not done:
        reason = next(iter(failed.values()), "no dialogue")
        raise DialogueError(f"{annotations}: expected dialogues over videos that can be read, found none: {reason}")
    report = report_of(
        [Measured(*record["measured"]) for record in done], [record["fps"] for record in done], threshold
    )
    return dataclasses.replace(report, rules={**report.rules, **rules_of(model)}, notes=tuple(failed.values()))
