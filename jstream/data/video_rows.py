"""Rows of dialogues over real videos, from any file that `data.annotations` reads.

What goes into which row is planned once, without decoding: every dialogue is rendered to count its tokens. A row is
then made where it is needed, from the videos, or from the frames or their features that the annotations bring.
"""

import contextlib
import itertools
import logging
import math
import multiprocessing
import os
import pathlib

import numpy as np
from tqdm import tqdm

from jstream.config import StageConfig, VisionConfig
from jstream.data.annotations import Annotation, Annotations, turns_of_annotation
from jstream.data.dialogue import DialogueError
from jstream.data.features import StoredFeatures, from_bytes, stored_features
from jstream.data.frames import fit, from_jpeg
from jstream.data.rows import Sample, lay_row, pack, turns_that_fit
from jstream.data.video import VideoError, open_video
from jstream.protocols.protocol import StreamProtocol

_MANY = 10_000  # annotations that one process measures in seconds; for more it is worth starting others


class VideoRows:
    """Rows of whole dialogues; only one that is longer than a row is cut, behind a turn.

    A video that cannot be read is left out with a warning that names it.

    Args:
        path: of annotations; relative video paths start at its folder.
        fps: sampled frames a second, where the annotations do not say.

    Raises:
        DialogueError: where the file cannot be read, or holds no dialogue whose video can be opened.
        ConfigError: where it holds features of other frames than these, or of a tower of another shape.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        stage: StageConfig,
        protocol: StreamProtocol,
        vision: VisionConfig,
        seed: int = 0,
        fps: float = 1.0,
    ):
        self.stage, self.protocol, self.vision, self.fps = stage, protocol, vision, fps
        self.annotations, self.stored = Annotations(path), stored_features(path)
        if self.stored is not None:
            self.stored.check(vision, fps)
        needs = self._needs()
        usable = np.flatnonzero(needs[:, 0])
        if not len(usable):
            raise DialogueError(f"{path}: expected dialogues over videos that can be opened, found none")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(usable))
        rows = pack(needs[usable], (stage.frames, stage.tokens), order)
        # as arrays, for they travel to every worker: row r is made of members[begins[r] : begins[r + 1]]
        self._num_frames = needs[:, 0].astype(np.int32)
        self._members = usable[np.fromiter(itertools.chain.from_iterable(rows), np.int64)]
        self._begins = np.cumsum([0, *map(len, rows)])

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        samples, left_out = [], 0
        for i in self._of_row(index):
            annotation = self.annotations[i]
            try:
                frames = sampled_frames(
                    self.annotations, self.stored, i, self.vision, self.fps, int(self._num_frames[i])
                )
            except (VideoError, DialogueError, OSError) as error:
                left_out += 1
                logging.warning("left out: %s", error)
                continue
            turns = turns_of_annotation(annotation, len(frames), self.fps)
            samples.append(Sample(self.protocol.render(turns), frames))
        features = None if self.stored is None else self.stored.dtype
        return lay_row(samples, self.stage, self.vision, None, index, left_out, features)

    def describe(self, index: int) -> str:
        """What a row is made of, for messages."""
        return f"row {index} of {self.annotations.path}: " + ", ".join(
            self.annotations[i].video for i in self._of_row(index)
        )

    def _of_row(self, index: int) -> list[int]:
        index = range(len(self))[index]
        return self._members[self._begins[index] : self._begins[index + 1]].tolist()

    # ---------------------------------------------------------------------------------------------------- the plan

    def _needs(self) -> np.ndarray:
        """int64 [N, 2]: frames and tokens that every annotation takes in a row; 0 where it is left out."""
        total, pool = len(self.annotations), None
        processes = min(os.cpu_count() or 1, 32) if total > _MANY else 1
        # what is sent with each chunk has the size of the whole index: few chunks where it is sent
        size = _MANY // 100 if processes == 1 else math.ceil(total / (4 * processes))
        chunks = [range(begin, min(begin + size, total)) for begin in range(0, total, size)]
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(tqdm(total=total, desc="packing", unit="dialogue", delay=2, dynamic_ncols=True))
            if processes > 1:
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            needs = []
            for made in pool.imap(self._measure, chunks) if pool else map(self._measure, chunks):
                needs.append(made)
                bar.update(len(made))
        return np.concatenate(needs) if needs else np.zeros((0, 2), np.int64)

    def _measure(self, indices: range) -> np.ndarray:
        """`_needs` of some annotations."""
        needs = np.zeros((len(indices), 2), np.int64)
        lengths: dict[tuple[str, float], int] = {}  # of videos that were asked: annotations of one lie together
        for at, annotation in enumerate(map(self.annotations.__getitem__, indices)):
            num_frames = min(self._num_frames_of(annotation, lengths), self.stage.frames)
            if not num_frames:
                continue
            rendering = self.protocol.render(turns_of_annotation(annotation, num_frames, self.fps))
            turns = turns_that_fit(rendering, self.stage)
            if turns:
                needs[at] = turns, rendering.ends[turns - 1]
            else:
                logging.warning("left out: %s: its first turn alone is longer than a row", annotation.video)
        return needs

    def _num_frames_of(self, annotation: Annotation, lengths: dict[tuple[str, float], int]) -> int:
        """As many as the annotation says, or the video where it says nothing; 0 where that cannot be read."""
        fps = annotation.fps or self.fps
        said = frames_said(annotation, fps)
        if said is not None:
            return said
        key = annotation.video, fps
        if key not in lengths:
            try:
                with open_video(*key) as video:
                    lengths[key] = video.num_frames or self.stage.frames
            except (VideoError, OSError) as error:
                logging.warning("left out: %s", error)
                lengths[key] = 0
        return lengths[key]


def frames_said(annotation: Annotation, fps: float) -> int | None:
    """How many frames an annotation says it has, at so many a second; None where it says nothing."""
    lasting = max(1, math.ceil(annotation.duration * fps - 1e-6)) if annotation.duration else None
    return min((number for number in (annotation.num_frames, lasting) if number is not None), default=None)


def sampled_frames(
    annotations: Annotations, stored: StoredFeatures | None, index: int, vision: VisionConfig, fps: float, limit: int
) -> np.ndarray:
    """The frames of an annotation, from the files it brings or from its video.

    Args:
        stored: what the annotations say of the features in them.
        fps: sampled frames a second, where the annotation does not say.
        limit: at most so many.

    Returns:
        uint8 [F, H, W, 3], or the features of frames [F, M, feature_width].

    Raises:
        VideoError, DialogueError, OSError: they cannot be read.
    """
    annotation = annotations[index]
    try:
        if stored is not None:
            return from_bytes((annotations.features(index) or ())[:limit], vision, stored.dtype)
        if (jpegs := annotations.frames(index)) is not None:
            return np.stack([fit(from_jpeg(jpeg), vision) for jpeg in jpegs[:limit]])
    except ValueError as error:
        raise VideoError(f"{annotation.video}: {error}") from None
    fps = annotation.fps or fps
    first = round(annotation.start * fps)
    with open_video(annotation.video, fps) as video:
        frames = [fit(frame.image, vision) for frame in itertools.islice(video, first, first + limit)]
    if not frames:
        raise VideoError(f"{annotation.video}: expected frames from {annotation.start:g} s on, found its end before")
    return np.stack(frames)
