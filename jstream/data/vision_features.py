"""Annotations and what a vision tower makes of their videos as one TFDS dataset: `vision_features` (`data.prepared`).

Every video is decoded once and seen by the tower once. A record holds, beside its path and its annotations:

    features      of each sampled frame, [M, feature_width] numbers as bytes (`data.features`)

What training does behind a tower that stays as it is needs neither it nor the videos. The tower itself is a function
that comes from elsewhere.
"""

import collections
import contextlib
import itertools
import pathlib
import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jstream.config import ConfigError, VisionConfig
from jstream.data import prepared
from jstream.data.annotations import prepared_settings
from jstream.data.dialogue import DialogueError
from jstream.data.features import DTYPES, Encode, to_bytes, tower_settings
from jstream.data.frames import fit, from_jpeg
from jstream.data.prepared import Stretch
from jstream.data.video import VideoError, open_video

_LARGEST = 2**29  # bytes of a video's features: a record is read as a whole
_FRAMES_AHEAD = 64  # of a video, decoded and waiting for the tower


class VisionFeatures(prepared.PreparedVideos):
    """The dataset over one annotation file, or over a folder of `data.streamo_instruct`, whose frames are taken then.

    Args:
        annotations: path of what `data.annotations.Annotations` opens.
        data_dir: folder above `vision_features/1.0.0`.
        vision: config of the tower.
        encode: the tower; what it gives is kept in its dtype.
        tower: what tells its params from others.
        fps: sampled frames a second, where the annotations do not say.
        max_frames: of a video, from the first on.
        dtype: of the features, one of `data.features.DTYPES`.
        workers: threads that decode.

    Raises:
        DialogueError: for annotations that cannot be read; while building, where no video can.
        ConfigError: for frames that were sampled at another rate, or features too large to be kept.
    """

    CACHE = "computed"

    def __init__(
        self,
        annotations: str | pathlib.Path,
        data_dir: str | pathlib.Path,
        vision: VisionConfig,
        encode: Encode,
        tower: str,
        fps: float = 1.0,
        max_frames: int = prepared.MAX_FRAMES,
        dtype: str = "bfloat16",
        workers: int = 1,
    ):
        source = prepared_settings(annotations)
        if source.get("fps", fps) != fps:
            raise ConfigError(
                f"{annotations}: expected frames at {fps:g} a second, found {source['fps']}; set "
                f"--config.fps={source['fps']}"
            )
        size = vision.tokens_per_frame * vision.feature_width * DTYPES[dtype].itemsize
        if size * max_frames > _LARGEST:
            raise ConfigError(
                f"expected at most {_LARGEST >> 20} MiB of features a video, found {size / 2**20:.2f} MiB a frame and "
                f"max_frames = {max_frames}; take --max_frames={_LARGEST // size} or fewer"
            )
        self.vision, self.encode, self.workers = vision, encode, workers
        made_by = {"dtype": dtype, "vision": tower_settings(vision), "tower": tower}
        self._made_by = {**made_by, "source": source}
        super().__init__(annotations, data_dir, fps, max_frames, made_by)

    def kept_columns(self) -> dict[str, Any]:
        return {"features": tfds.features.Sequence(tfds.features.Text())}

    def kept(self, file: pathlib.Path) -> tuple[dict[str, Any], int]:
        with np.load(file) as content:
            features = prepared.kept_frames(content)
        return {"features": features}, len(features)

    def make(self) -> Iterator[tuple[Stretch, pathlib.Path | str]]:
        files = {stretch: prepared.cached(self.cache, stretch, self._made_by) for stretch in self.stretches}
        missing = (stretch for stretch, file in files.items() if not file.exists())
        with contextlib.closing(_ahead(self._frames, missing, self.workers)) as decoded:
            for stretch, file in files.items():
                if file.exists():
                    yield stretch, file
                    continue
                try:
                    features = self.encode(next(decoded))
                except VideoError as error:
                    yield stretch, str(error)
                    continue
                yield stretch, prepared.keep(file, to_bytes(features))

    def _frames(self, stretch: Stretch) -> Iterator[np.ndarray]:
        """Yields the frames of a stretch as the tower takes them.

        Raises:
            VideoError: they cannot be read.
        """
        found = 0
        try:
            for image in self._images(stretch):
                found += 1
                yield fit(image, self.vision)
        except VideoError:
            raise
        except Exception as error:  # one video in a hundred thousand does what no other has done
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise VideoError(f"{stretch.video}: {kind}{error}") from None
        if not found:
            raise VideoError(f"{stretch.video}: expected frames from {stretch.start:g} s on, found its end")

    def _images(self, stretch: Stretch) -> Iterator[np.ndarray]:
        jpegs = self.annotations.frames(self.stretches[stretch][0])
        if jpegs is not None:
            yield from map(from_jpeg, jpegs[: stretch.num_frames])
            return
        first = round(stretch.start * stretch.fps)
        with open_video(stretch.video, stretch.fps) as video:
            for frame in itertools.islice(video, first, first + stretch.num_frames):
                yield frame.image


def _ahead(
    frames: Callable[[Stretch], Iterator[np.ndarray]], stretches: Iterator[Stretch], workers: int
) -> Generator[Iterator[np.ndarray], None, None]:
    """Yields the frames of each stretch, which as many threads as `workers` read ahead of whoever takes them."""
    stopped = threading.Event()
    under_way: collections.deque[queue.Queue] = collections.deque()

    def begin(stretch: Stretch) -> None:
        waiting: queue.Queue = queue.Queue(_FRAMES_AHEAD)
        threading.Thread(target=read, args=(stretch, waiting), daemon=True).start()
        under_way.append(waiting)

    def read(stretch: Stretch, waiting: queue.Queue) -> None:
        try:
            with contextlib.closing(frames(stretch)) as images:  # type: ignore[type-var]
                for image in images:
                    put(waiting, image)
            put(waiting, None)
        except VideoError as error:
            put(waiting, error)

    def put(waiting: queue.Queue, item: Any) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                return waiting.put(item, timeout=0.1)
        raise VideoError("nobody waits for it any more")

    try:
        for stretch in itertools.islice(stretches, workers):
            begin(stretch)
        while under_way:
            yield _taken(under_way.popleft())
            for stretch in itertools.islice(stretches, 1):
                begin(stretch)
    finally:
        stopped.set()


def _taken(waiting: queue.Queue) -> Iterator[np.ndarray]:
    """What a thread puts there, up to its end or its error."""
    while (item := waiting.get()) is not None:
        if isinstance(item, VideoError):
            raise item
        yield item


def prepare(builder: VisionFeatures) -> dict[str, Any]:
    """Builds the dataset, or goes on with it; see `prepared.build`.

    Raises:
        DialogueError: also where its folder holds other datasets, between which a reader could not choose.
    """
    own = pathlib.Path(builder.data_path).parent
    infos = own.parent.glob("*/[0-9]*/dataset_info.json")
    if others := [info.parent for info in infos if info.parent.parent != own]:
        raise DialogueError(f"{own.parent}: expected a folder for features alone, found {others[0]}; use another --out")
    return prepared.build(builder)
