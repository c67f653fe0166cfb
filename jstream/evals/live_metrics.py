"""The streaming metrics of VideoLLM-online over plain arrays: LM-PPL, TimeDiff, Fluency and LM-Correctness.

They are about a model that is given a whole dialogue as it should be (teacher forcing), so they tell of single
decisions, not of a model that lives with its own. Any model can be measured: what is needed of it stands in
`ReplyTurn`, and it is run once more only where it stayed silent to the end of a turn. The rules are those of
`stream_evaluate` in showlab/videollm-online (`models/modeling_live.py`), but for its frames: after a turn of which
nothing is learned it runs a silent model on over earlier ones.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jstream.evals.report import Part, Report, make_report

NOT_LEARNED = -100

RULES = {
    "decision": "The model speaks at a learned frame where silence is not its most probable token, or has a "
    "probability below {threshold:g}.",
    "LM-PPL": "exp of the mean cross entropy of a turn's reply tokens.",
    "LM-Correctness": "Share of a turn's reply tokens before the first that is not the most probable one.",
    "TimeDiff": "Learned frames between where the model first speaks and the last of the turn, at {fps} frames a "
    "second. A model that stays silent is run on over the frames of the next turn, fewer than the turn's own, until it "
    "speaks or they end; where there are none, it is taken to have spoken in time.",
    "Fluency": "Share of a turn's learned tokens, decisions and reply, before the first wrong one; as released, the "
    "decision to speak too early still counts as right.",
    "means": "Over the reply turns of a dialogue that have what is measured, then over dialogues that have any.",
}
_UNITS = {"LM-PPL": "", "TimeDiff": "s"}


@dataclasses.dataclass(frozen=True)
class ReplyTurn:
    """What a model predicts over the frames that lead to a reply, and the reply: L positions of a dialogue.

    Attributes:
        labels: int [L]: the token to be predicted at a position, or NOT_LEARNED.
        predicted: int [L]: the most probable token there.
        log_probs: [L]: the log-probability of the label; anything where nothing is learned.
        silence: [L]: the probability of silence; anything where no decision is learned.
        is_frame: bool [L]: whether the position holds a token of a frame. Learned ones are decisions, one a frame; the
            other learned ones belong to the reply.
        num_frames: how many frames the turn has, learned or not.
    """

    labels: np.ndarray
    predicted: np.ndarray
    log_probs: np.ndarray
    silence: np.ndarray
    is_frame: np.ndarray
    num_frames: int

    def __post_init__(self):
        sizes = {len(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name != "num_frames"}
        if len(sizes) != 1:
            raise ValueError(f"a reply turn: expected arrays of one length, found lengths {sorted(sizes)}")


class Decisions(NamedTuple):
    """At n frames: the most probable token, int [n], and the probability of silence, [n]."""

    predicted: np.ndarray
    silence: np.ndarray


class Measured(NamedTuple):
    """Of a reply turn, or the mean over those of a dialogue; None where there is nothing to measure."""

    perplexity: float | None
    frames_off: float | None
    fluency: float | None
    correctness: float | None


RunOn = Callable[[int, int], Decisions]


def measure_dialogue(
    turns: Sequence[ReplyTurn], silence_id: int, run_on: RunOn | None = None, threshold: float = 0.0
) -> Measured:
    """Measures the reply turns of one dialogue, in order; also those are needed of which nothing is learned.

    Args:
        silence_id: the token of silence.
        run_on: what a model decides that goes on after the last learned frame of turn `i` without its reply, at each of
            `n` further frames: `run_on(i, n)`. None takes it to stay silent.
        threshold: below this probability of silence it speaks.
    """
    measured = []
    for i, turn in enumerate(turns):
        further = min(turns[i + 1].num_frames, turn.num_frames - 1) if i + 1 < len(turns) else 0
        measured.append(_measure(turn, i, max(further, 0), silence_id, run_on, threshold))
    columns = [[value for value in column if value is not None] for column in zip(*measured)] or [[]] * 4
    return Measured(*(float(np.mean(column)) if column else None for column in columns))


def _measure(
    turn: ReplyTurn, index: int, further: int, silence_id: int, run_on: RunOn | None, threshold: float
) -> Measured:
    learned = turn.labels != NOT_LEARNED
    frames, words = learned & turn.is_frame, learned & ~turn.is_frame
    num_frames, num_words = int(frames.sum()), int(words.sum())
    perplexity = frames_off = fluency = correctness = None
    right_words = _first(turn.predicted[words] != turn.labels[words], num_words)
    if num_words:
        perplexity = float(np.exp(-turn.log_probs[words].mean()))
        correctness = right_words / num_words
    if num_frames:
        off = num_frames - 1 - _first(_speaks(turn.predicted[frames], turn.silence[frames], silence_id, threshold), -1)
        if off == num_frames:  # it stayed silent
            late = further
            if further and run_on is not None:
                predicted, silence = run_on(index, further)
                late = min(_first(_speaks(predicted, silence, silence_id, threshold), further) + 1, further)
            off = -late
        frames_off = abs(off)
        if num_words:
            right = num_frames + right_words if off == 0 else num_frames - max(off, 1)
            fluency = right / (num_frames + num_words)
    return Measured(perplexity, frames_off, fluency, correctness)


def _speaks(predicted: np.ndarray, silence: np.ndarray, silence_id: int, threshold: float) -> np.ndarray:
    return (predicted != silence_id) | (silence < threshold)


def _first(found: np.ndarray, otherwise: int) -> int:
    """The index of the first True."""
    return int(np.argmax(found)) if found.any() else otherwise


def report_of(dialogues: Sequence[Measured], fps: float | Sequence[float], threshold: float = 0.0) -> Report:
    """The report of measured dialogues.

    Args:
        fps: frames a second, of all or of each.
        threshold: as measured with.
    """
    rates = [fps] * len(dialogues) if isinstance(fps, int | float) else list(fps)
    columns = {
        "LM-PPL": [d.perplexity for d in dialogues],
        "TimeDiff": [None if d.frames_off is None else d.frames_off / r for d, r in zip(dialogues, rates, strict=True)],
        "Fluency": [d.fluency for d in dialogues],
        "LM-Correctness": [d.correctness for d in dialogues],
    }
    parts: dict[str, list[Part]] = {k: [(v, 1) for v in column if v is not None] for k, column in columns.items()}
    of_all = " or ".join(f"{rate:g}" for rate in sorted(set(rates)))
    rules = {what: rule.format(fps=of_all, threshold=threshold) for what, rule in RULES.items()}
    return make_report("Streaming metrics of VideoLLM-online", parts, rules, units=_UNITS, drawn="dialogues")
