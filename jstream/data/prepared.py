"""Annotations and what is kept of their videos as one TFDS dataset, in ArrayRecord files: what all such datasets share.

A record holds a video and all that is said over it:

    video         its path
    annotations   the JSON of its annotations, as they came
    …             what the dataset keeps of it, frame by frame

Beside the shards lie `annotations.jsonl` (the annotations in the order of the records, each with where its frames are:
what `data.annotations.Annotations` opens) and `skipped.jsonl` (the videos that could not be read, and why).

Nothing here needs TensorFlow. That is why the builder is a `ShardBasedBuilder`: TFDS' `GeneratorBasedBuilder` turns to
TensorFlow's file system for more than a gigabyte, and sorts a split that keeps its order in memory.

A video that is done is kept in a folder of its own until all are, so a build that was killed goes on where it was. TFDS
gives the dataset its name when it is whole.
"""

import abc
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from jstream.data.annotations import INDEX, SETTINGS, Annotations
from jstream.data.dialogue import DialogueError

SKIPPED = "skipped.jsonl"
MAX_FRAMES = 1200  # of a video: ten minutes of a chat, as VideoLLM-online is trained (`--max_num_frames`)
_VIDEOS_A_SHARD = 256  # some hundred megabytes


@dataclasses.dataclass(frozen=True)
class Stretch:
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


class PreparedVideos(tfds.core.ShardBasedBuilder, abc.ABC):
    """A dataset over one annotation file; `build` makes it, or goes on where a killed build has left off.

    Attributes:
        CACHE: name of the folder where videos that are done wait for the others.

    Args:
        annotations: path of what `data.annotations.Annotations` opens.
        data_dir: folder above that of the dataset.
        fps: sampled frames a second, where the annotations do not say.
        max_frames: of a video, from the first on.
        settings: what else makes the dataset what it is.

    Raises:
        DialogueError: for annotations that cannot be read; while building, where no video can.
    """

    VERSION = tfds.core.Version("1.0.0")
    CACHE: ClassVar[str]

    def __init__(
        self,
        annotations: str | pathlib.Path,
        data_dir: str | pathlib.Path,
        fps: float,
        max_frames: int,
        settings: Mapping[str, Any],
    ):
        self.annotations = Annotations(annotations)
        self.stretches, digest = self._read(fps, max_frames)
        self.settings = {"fps": fps, "max_frames": max_frames, **settings, "annotations": digest}
        self.cache = pathlib.Path(data_dir) / self.name / self.CACHE
        super().__init__(data_dir=os.fspath(data_dir), file_format="array_record")

    @abc.abstractmethod
    def kept_columns(self) -> dict[str, Any]:
        """TFDS features of what is kept of a video."""

    @abc.abstractmethod
    def kept(self, file: pathlib.Path) -> tuple[dict[str, Any], int]:
        """What `make` has kept of a video, by column, and the number of its frames."""

    @abc.abstractmethod
    def make(self) -> Iterator[tuple[Stretch, pathlib.Path | str]]:
        """Yields each stretch, in order, with a file in the cache, or why there is none."""

    def _read(self, fps: float, max_frames: int) -> tuple[dict[Stretch, list[int]], str]:
        """The stretches with the indices of their annotations, in the order of the first; a hash of what was read."""
        indices: dict[tuple[str, float, float], list[int]] = {}
        longest: dict[tuple[str, float, float], int] = {}
        digest = hashlib.sha256()
        bar = tqdm(range(len(self.annotations)), desc="reading", unit="annotation", delay=2, dynamic_ncols=True)
        for index in bar:
            annotation = self.annotations[index]
            key = annotation.video, annotation.fps or fps, annotation.start
            wanted = max_frames if annotation.num_frames is None else annotation.num_frames
            indices.setdefault(key, []).append(index)
            longest[key] = min(max(longest.get(key, 0), wanted), max_frames)
            digest.update(json.dumps([annotation.video, self.annotations.record(index)]).encode())
        return {Stretch(*key, longest[key]): of for key, of in indices.items()}, digest.hexdigest()

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "video": tfds.features.Text(),
            "annotations": tfds.features.Sequence(tfds.features.Text()),
            **self.kept_columns(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos frame by frame, with the streaming dialogues over them.",
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
            for stretch, made in self.make():
                bar.update()
                if isinstance(made, str):
                    annotations, reason = len(self.stretches[stretch]), made
                    skipped.write(json.dumps({"video": stretch.video, "annotations": annotations, "why": made}) + "\n")
                    continue
                columns, num_frames = self.kept(made)
                records = [self.annotations.record(i) for i in self.stretches[stretch]]
                where = {"record": number, "num_frames": num_frames, "fps": stretch.fps, "video": stretch.video}
                index.writelines(json.dumps(record | {"prepared": where}) + "\n" for record in records)
                texts = [json.dumps(record) for record in records]
                yield number, {"video": stretch.video, "annotations": texts, **columns}
                number += 1
        if not number:
            raise DialogueError(f"{self.annotations.path}: expected a video that can be read, found none: {reason}")


# ----------------------------------------------------------------------------------------------------------- the cache


def cached(cache: pathlib.Path, stretch: Stretch, made_by: Any) -> pathlib.Path:
    """The file of a stretch in the cache.

    Args:
        made_by: what its content depends on; JSON.
    """
    key = [dataclasses.astuple(stretch), made_by]
    if os.path.isfile(stretch.video):  # another file under the same name has other frames
        key.append((os.path.getsize(stretch.video), os.stat(stretch.video).st_mtime_ns))
    return cache / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npz"


def keep(file: pathlib.Path, frames: Sequence[bytes], **arrays: np.ndarray) -> pathlib.Path:
    """Writes what is kept of the frames of a video, and arrays beside it; the file appears whole or not at all."""
    partial = file.with_suffix(".partial")
    ends = np.cumsum([len(frame) for frame in frames])
    content: dict[str, Any] = {"frames": np.frombuffer(b"".join(frames), np.uint8), "ends": ends, **arrays}
    with partial.open("wb") as out:
        np.savez(out, **content)
    partial.replace(file)
    return file


def kept_frames(content: Mapping[str, np.ndarray]) -> list[bytes]:
    """What `keep` was given."""
    return [part.tobytes() for part in np.split(content["frames"], content["ends"][:-1])]


# ----------------------------------------------------------------------------------------------------------- the build


def build(builder: PreparedVideos) -> dict[str, Any]:
    """Builds a dataset, or goes on with it.

    Returns:
        `folder` of the dataset and the numbers of `videos`, `annotations` and `skipped` videos in it.

    Raises:
        DialogueError: where none of the videos can be read, or for a folder with another dataset.
        OSError: where the folder cannot be written.
    """
    folder = pathlib.Path(builder.data_path)
    if folder.exists():
        _check_settings(folder, builder.settings)
    else:
        _build(builder, folder)
    lines = lambda name: sum(1 for _ in (folder / name).open("rb"))
    videos = sum(builder.info.splits["train"].shard_lengths)
    return {"folder": folder, "videos": videos, "annotations": lines(INDEX), "skipped": lines(SKIPPED)}


def _build(builder: PreparedVideos, folder: pathlib.Path) -> None:
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
    found = json.loads((folder / SETTINGS).read_text())
    other = [f"{name} = {found.get(name)}, not {value}" for name, value in settings.items() if found.get(name) != value]
    if other:
        raise DialogueError(f"{folder}: the dataset there has {'; '.join(other)}; delete it or use another folder")
