"""Annotations and their videos as one TFDS dataset: `streamo_instruct`, in ArrayRecord files.

Every video is decoded once, and a record holds it with all that is said over it:

    video         its path
    annotations   the JSON of its annotations, as they came
    frames        JPEG, sampled at `fps` by the rule of `data.video` (a chat: at its own rate, from its first frame on)
    times         float64: seconds into the video of each frame

Beside the shards lie `annotations.jsonl` (the annotations in the order of the records, each with where its frames are:
what `data.annotations.Annotations` opens) and `skipped.jsonl` (the videos that could not be read, and why).

Nothing here needs TensorFlow. That is why the builder is a `ShardBasedBuilder`: TFDS' `GeneratorBasedBuilder` turns to
TensorFlow's file system for more than a gigabyte, and sorts a split that keeps its order in memory.

A video that is done is kept in a folder `decoded` until all are, so a build that was killed goes on where it was. TFDS
gives the dataset its name when it is whole.
"""

import collections
import concurrent.futures.process
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jstream.data.annotations import INDEX, Annotations
from jstream.data.dialogue import DialogueError
from jstream.data.frames import to_jpeg
from jstream.data.video import VideoError, open_video
from jstream.protocols.streamo import MAX_PIXELS

SKIPPED = "skipped.jsonl"
_VIDEOS_A_SHARD = 256  # some hundred megabytes
_MAX_FRAMES = 1200  # of a video: ten minutes of a chat, as VideoLLM-online is trained (`--max_num_frames`)


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
    max_frames: int = _MAX_FRAMES

    def __post_init__(self):
        limits = {"fps": (0, 1000), "max_pixels": (1, 2**24), "quality": (1, 95), "max_frames": (1, 100_000)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most or not value:
                raise DialogueError(f"{name}: expected {least} to {most}, found {value}")


@dataclasses.dataclass(frozen=True)
class _Stretch:
    """Of a video, what annotations speak about.

    Attributes:
        video: path of the file.
        fps: sampled frames a second.
        start: seconds of the first frame.
        num_frames: at most so many.
    """

    video: str
    fps: float
    start: float
    num_frames: int


class StreamoInstruct(tfds.core.ShardBasedBuilder):
    """The dataset over one annotation file; `prepare` builds it where a killed build has left off.

    Args:
        annotations: path of what `data.annotations.Annotations` opens.
        data_dir: folder above `streamo_instruct/1.0.0`.
        sampling: of the videos.
        workers: processes that decode; the records and their order do not depend on them.

    Raises:
        DialogueError: for annotations that cannot be read; while building, where no video can.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        annotations: str | pathlib.Path,
        data_dir: str | pathlib.Path,
        sampling: Sampling | None = None,
        workers: int = 1,
    ):
        self.annotations, self.sampling, self.workers = Annotations(annotations), sampling or Sampling(), workers
        self.stretches, digest = self._read()
        self.settings = {**dataclasses.asdict(self.sampling), "annotations": digest}
        self.cache = pathlib.Path(data_dir) / self.name / "decoded"
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    def _read(self) -> tuple[dict[_Stretch, list[int]], str]:
        """The stretches with the indices of their annotations, in the order of the first; a hash of what was read."""
        indices: dict[tuple[str, float, float], list[int]] = {}
        longest: dict[tuple[str, float, float], int] = {}
        digest = hashlib.sha256()
        bar = tqdm(range(len(self.annotations)), desc="reading", unit="annotation", delay=2, dynamic_ncols=True)
        for index in bar:
            annotation = self.annotations[index]
            key = annotation.video, annotation.fps or self.sampling.fps, annotation.start
            wanted = self.sampling.max_frames if annotation.num_frames is None else annotation.num_frames
            indices.setdefault(key, []).append(index)
            longest[key] = min(max(longest.get(key, 0), wanted), self.sampling.max_frames)
            digest.update(json.dumps([annotation.video, self.annotations.record(index)]).encode())
        return {_Stretch(*key, longest[key]): of for key, of in indices.items()}, digest.hexdigest()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "video": tfds.features.Text(),
            "annotations": tfds.features.Sequence(tfds.features.Text()),
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")),
            "times": tfds.features.Sequence(np.float64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos as sampled frames, with the streaming dialogues over them.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(self.settings),
            disable_shuffling=True,  # grain shuffles; what is said over one video stays together
        )

    def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable[[], Iterator[tuple[int, Any]]]]]:
        del dl_manager
        examples = self._examples(pathlib.Path(self.data_path))
        full = lambda: itertools.islice(examples, _VIDEOS_A_SHARD)
        shards = math.ceil(len(self.stretches) / _VIDEOS_A_SHARD)
        return {"train": [full] * (shards - 1) + [lambda: examples]}  # the last one brings the generator to its end

    def _examples(self, folder: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the records; writes the files beside the shards."""
        number, reason = 0, ""
        with (
            (folder / INDEX).open("x", encoding="utf-8") as index,
            (folder / SKIPPED).open("x", encoding="utf-8") as skipped,
            tqdm(total=len(self.stretches), unit="video", dynamic_ncols=True) as bar,
        ):
            for stretch, made in self._decoded():
                bar.update()
                if isinstance(made, str):
                    annotations, reason = len(self.stretches[stretch]), made
                    skipped.write(json.dumps({"video": stretch.video, "annotations": annotations, "why": made}) + "\n")
                    continue
                with np.load(made) as kept:
                    frames = [part.tobytes() for part in np.split(kept["jpegs"], kept["ends"][:-1])]
                    times = kept["times"]
                records = [self.annotations.record(i) for i in self.stretches[stretch]]
                where = {"record": number, "num_frames": len(frames), "fps": stretch.fps, "video": stretch.video}
                index.writelines(json.dumps(record | {"prepared": where}) + "\n" for record in records)
                texts = [json.dumps(record) for record in records]
                yield number, {"video": stretch.video, "annotations": texts, "frames": frames, "times": times}
                number += 1
        if not number:
            raise DialogueError(f"{self.annotations.path}: expected a video that can be read, found none: {reason}")

    def _decoded(self) -> Iterator[tuple[_Stretch, pathlib.Path | str]]:
        """Yields each stretch, in order, with the file of its frames, or why there is none."""
        decode = functools.partial(_decode, sampling=self.sampling, cache=self.cache)
        if self.workers == 1:
            yield from ((stretch, decode(stretch)) for stretch in self.stretches)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(self.workers, context, _start_worker) as executor:
            under_way: collections.deque[tuple[_Stretch, concurrent.futures.Future]] = collections.deque()
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


def _decode(stretch: _Stretch, sampling: Sampling, cache: pathlib.Path) -> pathlib.Path | str:
    """Writes the frames of a stretch to the cache, unless they are there; returns the file, or what was wrong."""
    key = [dataclasses.astuple(stretch), dataclasses.astuple(sampling)]
    if os.path.isfile(stretch.video):  # another file under the same name has other frames
        key.append((os.path.getsize(stretch.video), os.stat(stretch.video).st_mtime_ns))
    path = cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"
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
    partial = path.with_suffix(".partial")
    with partial.open("wb") as out:
        ends = np.cumsum([len(jpeg) for jpeg in jpegs])
        np.savez(out, jpegs=np.frombuffer(b"".join(jpegs), np.uint8), ends=ends, times=np.asarray(times))
    partial.replace(path)
    return path


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
    builder = StreamoInstruct(annotations, out, sampling, workers)
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        _check_settings(folder, builder.settings)
    else:
        _build(builder, folder)
    lines = lambda name: sum(1 for _ in (folder / name).open("rb"))
    videos = sum(builder.info.splits["train"].shard_lengths)
    return {"folder": folder, "videos": videos, "annotations": lines(INDEX), "skipped": lines(SKIPPED)}


def _build(builder: StreamoInstruct, folder: pathlib.Path) -> None:
    builder.cache.mkdir(parents=True, exist_ok=True)
    with (builder.cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DialogueError(f"{folder.parent}: expected no other build here, found one; wait for it") from None
        for killed in folder.parent.glob("incomplete.*"):
            shutil.rmtree(killed)
        with contextlib.redirect_stdout(io.StringIO()):  # it tells of downloads
            builder.download_and_prepare(download_dir=builder.cache / "downloads")
        shutil.rmtree(builder.cache)


def _check_settings(folder: pathlib.Path, settings: dict[str, Any]) -> None:
    found = json.loads((folder / "metadata.json").read_text())
    other = [f"{name} = {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value]
    if other:
        raise DialogueError(f"{folder}: the dataset there has {'; '.join(other)}; delete it or use another folder")
