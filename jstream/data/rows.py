"""Rows: a fixed number of frame and token slots, packed with whole dialogues.

What every source of training data gives (`world_rows.WorldRows`, `video_rows.VideoRows`). A row of F frame slots and T
token slots holds:

    row          int32 []                   its index in the source
    left_out     int32 []                   dialogues that it lacks, as their videos cannot be read
    frames       uint8 [F, H, W, 3]         the sampled frames of the row's dialogues, one after the other; or, where a
    features     [F, M, feature_width]      vision tower has seen them already, what it made of them, bfloat16 or f32
    first        bool  [F]                  frames that open a dialogue
    decisions    int32 [F]                  the token slot where the frame's turn is decided; −1 for an unused slot
    tokens       int32 [T]                  rendered dialogues; is_frame bool [T] marks the placeholders
    positions    int32 [T]                  index inside the dialogue, −1 for padding
    segments     int32 [T]                  which dialogue of the row
    labels       int32 [T], kinds int8      what each position predicts (`protocols.protocol.Rendering`)
    vocabulary   int32 [W]                  ids of the words of the auxiliary labels, where the source has them:
    words        uint8 [F, grid², W]        what each cell of the frame shows
    happenings   uint8 [F, 2, W]            events in progress, events just over
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from jstream.config import SiglipConfig, StageConfig, VisionConfig
from jstream.protocols.protocol import Rendering

_TOGETHER = 1024  # dialogues that are packed at a time: enough to fill rows well, and linear in their number


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue with its frames, ready to be laid in a row.

    Attributes:
        rendering: tokens of the whole dialogue, one turn a frame.
        frames: uint8 [F, H, W, 3], or the features of them [F, M, feature_width].
        words: uint8 [F, grid², W]; happenings: uint8 [F, 2, W]; None where the source has no such labels.
    """

    rendering: Rendering
    frames: np.ndarray
    words: np.ndarray | None = None
    happenings: np.ndarray | None = None


def lay_row(
    samples: Sequence[Sample],
    stage: StageConfig,
    vision: VisionConfig,
    vocabulary: np.ndarray | None = None,
    index: int = 0,
    left_out: int = 0,
    features: DTypeLike | None = None,
) -> dict[str, np.ndarray]:
    """Packs samples into row `index`; a dialogue with too many tokens is cut behind its last whole turn that fits.

    Args:
        features: their dtype, where the samples bring features in place of frames.
    """
    seen = "frames" if features is None else "features"
    row = {
        "row": np.asarray(index, np.int32),
        "left_out": np.asarray(left_out, np.int32),
        seen: np.zeros((stage.frames, *vision.frame_size, 3), np.uint8)
        if features is None
        else np.zeros((stage.frames, vision.tokens_per_frame, vision.feature_width), features),
        "first": np.zeros(stage.frames, bool),
        "decisions": np.full(stage.frames, -1, np.int32),
        "tokens": np.zeros(stage.tokens, np.int32),
        "is_frame": np.zeros(stage.tokens, bool),
        "positions": np.full(stage.tokens, -1, np.int32),
        "segments": np.full(stage.tokens, -1, np.int32),
        "labels": np.zeros(stage.tokens, np.int32),
        "kinds": np.zeros(stage.tokens, np.int8),
    }
    if vocabulary is not None and isinstance(vision, SiglipConfig):
        row["vocabulary"] = vocabulary
        row["words"] = np.zeros((stage.frames, vision.grid**2, len(vocabulary)), np.uint8)
        row["happenings"] = np.zeros((stage.frames, 2, len(vocabulary)), np.uint8)
    frame, token = 0, 0
    for segment, sample in enumerate(samples):
        rendering = sample.rendering
        whole = int(np.sum(rendering.ends <= stage.tokens - token)) if stage.tokens else len(sample.frames)
        num_frames = min(len(sample.frames), stage.frames - frame, whole)
        if not num_frames:
            break
        frames = slice(frame, frame + num_frames)
        row[seen][frames] = sample.frames[:num_frames]
        row["first"][frame] = True
        row["decisions"][frames] = rendering.decisions[:num_frames] + token if stage.tokens else 0
        if not stage.tokens:
            row["decisions"][frame] = -1  # what moves shows from the second frame of a clip on
        if "words" in row and sample.words is not None and sample.happenings is not None:
            row["words"][frames] = sample.words[:num_frames]
            row["happenings"][frames] = sample.happenings[:num_frames]
        if stage.tokens:
            cut = int(rendering.ends[num_frames - 1])
            tokens = slice(token, token + cut)
            for name in ("tokens", "is_frame", "labels", "kinds"):
                row[name][tokens] = getattr(rendering, name)[:cut]
            row["positions"][tokens] = np.arange(cut)
            row["segments"][tokens] = segment
            token += cut
        frame += num_frames
    return row


def turns_that_fit(rendering: Rendering, stage: StageConfig) -> int:
    """How many turns of a dialogue, from the first on, go into a row of its own."""
    return min(len(rendering.ends), stage.frames, int(np.searchsorted(rendering.ends, stage.tokens, side="right")))


def pack(needs: np.ndarray, room: tuple[int, int], order: np.ndarray) -> list[list[int]]:
    """Chooses which dialogues share a row so that none is cut: the largest first, each where least is left over.

    Args:
        needs: int [N, 2]: frame and token slots of each dialogue, no more than a row has.
        room: frame and token slots of a row.
        order: int [N], a permutation: neighbours in it may share rows.

    Returns:
        Indices of the dialogues in each row; every dialogue is in one.
    """
    size = np.asarray(room)
    rows: list[list[int]] = []
    for begin in range(0, len(order), _TOGETHER):
        together = order[begin : begin + _TOGETHER]
        together = together[np.argsort(-(needs[together] / size).max(axis=1), kind="stable")]
        left, first = np.tile(size, (len(together), 1)), len(rows)  # an empty row is always there, the last to be taken
        for i in together.tolist():
            count = len(rows) - first + 1
            rest = left[:count] - needs[i]
            at = int(np.where((rest >= 0).all(axis=1), (rest / size).min(axis=1), np.inf).argmin())
            left[at] = rest[at]
            if at == count - 1:
                rows.append([])
            rows[first + at].append(i)
    return rows
