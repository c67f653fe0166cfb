"""Annotations and their videos as one TFDS dataset: `streamo_instruct`, in ArrayRecord files (`data.prepared`).

Every video is decoded once, and a record holds, beside its path and its annotations:

    frames        JPEG, sampled at `fps` by the rule of `data.video` (a chat: at its own rate, from its first frame on)
    times         float64: seconds into the video of each frame
"""

import collections
import concurrent.futures.process
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jstream.data import prepared
from jstream.data.dialogue import DialogueError
from jstream.data.frames import to_jpeg
from jstream.data.prepared import Stretch
from jstream.data.video import VideoError, open_video
from jstream.protocols.streamo import MAX_PIXELS


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a video becomes frames.

    Attributes:
        fps: sampled frames a second, where the annotations do not say.
        max_pixels: of a frame; larger ones are scaled down, their aspect kept.
        quality: of the JPEG, 1 to 95.
        max_frames: of a video, from the first on.
    """

    fps: float = 1.0
    max_pixels: int = MAX_PIXELS
    quality: int = 90
    max_frames: int = prepared.MAX_FRAMES

    def __post_init__(self):
        limits = {"fps": (0, 1000), "max_pixels": (1, 2**24), "quality": (1, 95), "max_frames": (1, 100_000)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most or not value:
                raise DialogueError(f"{name}: expected {least} to {most}, found {value}")


class StreamoInstruct(prepared.PreparedVideos):
    """The dataset over one annotation file; `prepare` builds it where a killed build has left off.

    Args:
        annotations: path of what `data.annotations.Annotations` opens.
        data_dir: folder above `streamo_instruct/1.0.0`.
        sampling: of the videos.
        workers: processes that decode; the records and their order do not depend on them.

    Raises:
        DialogueError: for annotations that cannot be read; while building, where no video can.
    """

    CACHE = "decoded"

    def __init__(
        self,
        annotations: str | pathlib.Path,
        data_dir: str | pathlib.Path,
        sampling: Sampling | None = None,
        workers: int = 1,
    ):
        self.sampling, self.workers = sampling or Sampling(), workers
        settings = dataclasses.asdict(self.sampling)
        super().__init__(annotations, data_dir, self.sampling.fps, self.sampling.max_frames, settings)

    def kept_columns(self) -> dict[str, Any]:
        return {
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
            "times": tfds.features.Sequence(np.float64),
        }

    def kept(self, file: pathlib.Path) -> tuple[dict[str, Any], int]:
        with np.load(file) as content:
            frames, times = prepared.kept_frames(content), content["times"]
        return {"frames": frames, "times": times}, len(frames)

    def make(self) -> Iterator[tuple[Stretch, pathlib.Path | str]]:
        decode = functools.partial(_decode, sampling=self.sampling, cache=self.cache)
        if self.workers == 1:
            yield from ((stretch, decode(stretch)) for stretch in self.stretches)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.workers, context, _start_worker) as executor:
            under_way: collections.deque[tuple[Stretch, concurrent.futures.Future]] = collections.deque()
            ahead = 4 * self.workers
            try:
                for stretch in itertools.chain(self.stretches, itertools.repeat(None, ahead)):
                    if stretch is not None:
                        under_way.append((stretch, executor.submit(decode, stretch)))
                    if under_way and (stretch is None or len(under_way) > ahead):
                        first, future = under_way[0]
                        yield first, future.result()
                        under_way.popleft()
            except concurrent.futures.process.BrokenProcessPool:
                unfinished = [stretch.video for stretch, future in under_way if future.exception() is not None]
                raise DialogueError(
                    "expected to decode on, found that a process was ended (by the system, for memory, or by a fault "
                    f"of FFmpeg) at one of {', '.join(unfinished[: self.workers])}; start again, with fewer workers or "
                    "without that video"
                ) from None
            finally:
                executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Lets a worker end when the process that reads from it is gone, killed ones included."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _decode(stretch: Stretch, sampling: Sampling, cache: pathlib.Path) -> pathlib.Path | str:
    """Writes the frames of a stretch to the cache, unless they are there; returns the file, or what was wrong."""
    path = prepared.cached(cache, stretch, dataclasses.astuple(sampling))
    if path.exists():
        return path
    first = round(stretch.start * stretch.fps)
    try:
        with open_video(stretch.video, stretch.fps) as video:
            sampled = [
                (to_jpeg(frame.image, sampling.max_pixels, sampling.quality), frame.time)
                for frame in itertools.islice(video, first, first + stretch.num_frames)
            ]
    except VideoError as error:
        return str(error)
    except Exception as error:  # one video in a hundred thousand does what no other has done
        return f"{stretch.video}: {type(error).__name__}: {error}"
    if not sampled:
        return f"{stretch.video}: expected frames from {stretch.start:g} s on, found its end"
    jpegs, times = zip(*sampled, strict=True)
    return prepared.keep(path, jpegs, times=np.asarray(times))


def prepare(
    annotations: str | pathlib.Path, out: str | pathlib.Path, sampling: Sampling | None = None, workers: int = 1
) -> dict[str, Any]:
    """Builds the dataset under a folder, or goes on with it.

    Returns:
        `folder` of the dataset and the numbers of `videos`, `annotations` and `skipped` videos in it.

    Raises:
        DialogueError: for annotations that cannot be read, none of whose videos can, or a folder with another dataset.
        OSError: where the folder cannot be written.
    """
    return prepared.build(StreamoInstruct(annotations, out, sampling, workers))
