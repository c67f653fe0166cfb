"""From dialogues to batches: rows of a fixed number of frame and token slots, packed with whole dialogues.

A row is a pure function of its index, made in a worker process: the video is decoded (or the world rendered) there, the
protocol renders the dialogue, and both are laid side by side. grain shuffles, batches, prefetches and remembers where
it was. A batch holds, for B rows of F frame slots and T token slots:

    frames       uint8 [B, F, H, W, 3]      the sampled frames of the row's dialogues, one after the other
    first        bool  [B, F]               frames that open a dialogue
    decisions    int32 [B, F]               the token slot where the frame's turn is decided; −1 for an unused slot
    tokens       int32 [B, T]               rendered dialogues; is_frame bool [B, T] marks the placeholders
    positions    int32 [B, T]               index inside the dialogue, −1 for padding
    segments     int32 [B, T]               which dialogue of the row
    labels       int32 [B, T], kinds int8   what each position predicts (`protocols.protocol.Rendering`)
    vocabulary   int32 [B, W]               ids of the words of the auxiliary labels, where the source has them:
    words        uint8 [B, F, grid², W]     what each cell of the frame shows
    happenings   uint8 [B, F, 2, W]         events in progress, events just over
"""

import dataclasses
import logging
import os
import pathlib
import signal
import threading
import time
from collections.abc import Sequence

import grain
import numpy as np
from absl import flags

from jstream.config import ConfigError, SiglipConfig, StageConfig, VisionConfig
from jstream.data import world as worlds
from jstream.data.dialogue import Dialogue, DialogueError, read_raw
from jstream.data.frames import fit
from jstream.data.video import VideoError, open_video
from jstream.data.world.labels import WORDS, scene_labels
from jstream.protocols.protocol import Rendering, StreamProtocol
from jstream.protocols.streamo import turns_of

_OPEN_ROWS = 64  # that a dialogue may still go into: enough to fill rows well, and linear in the number of dialogues
VISION_CLIP = 6  # consecutive frames of one video where the vision tower is trained alone; the first is context only


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue with its frames, ready to be laid in a row.

    Attributes:
        rendering: tokens of the whole dialogue, one turn a frame.
        frames: uint8 [F, H, W, 3].
        words: uint8 [F, grid², W]; happenings: uint8 [F, 2, W]; None where the source has no such labels.
    """

    rendering: Rendering
    frames: np.ndarray
    words: np.ndarray | None = None
    happenings: np.ndarray | None = None


def lay_row(
    samples: Sequence[Sample], stage: StageConfig, vision: VisionConfig, vocabulary: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Packs samples into one row; a dialogue with too many tokens is cut behind its last whole turn that fits."""
    row = {
        "frames": np.zeros((stage.frames, *vision.frame_size, 3), np.uint8),
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
        row["frames"][frames] = sample.frames[:num_frames]
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


# ----------------------------------------------------------------------------------------------------------- the world


def vocabulary_ids(protocol: StreamProtocol) -> np.ndarray:
    """int32 [W]: the token of each word of the auxiliary labels, as it stands inside a sentence."""
    ids = [protocol.tokenizer.encode(" " + word) for word in WORDS]
    split = [word for word, tokens in zip(WORDS, ids, strict=True) if len(tokens) != 1]
    if split:
        raise ConfigError(
            f"auxiliary labels: expected a vocabulary with one token for each of its words, found more for "
            f"{', '.join(split)}; train with the world's own tokenizer and a vocab_size of 600 or more"
        )
    return np.asarray(ids, np.int32)[:, 0]


class WorldRows:
    """Rows of the world, rendered on the fly: every row is made of videos that no other row has.

    Args:
        seed: of the worlds; evaluation uses others.
        stage: shape of the rows, lengths and mix of tasks.
        number: of the stage, so that stages see different worlds.
    """

    def __init__(self, seed: int, stage: StageConfig, number: int, protocol: StreamProtocol, vision: VisionConfig):
        self.seed, self.stage, self.number, self.protocol, self.vision = seed, stage, number, protocol, vision
        self.vocabulary = vocabulary_ids(protocol) if stage.objective.needs_names else None
        self.weights = dict(stage.weights) or worlds.DEFAULT_WEIGHTS
        tasks = worlds.TASKS | worlds.LESSONS
        if self.weights.keys() - tasks.keys() or not any(weight > 0 for weight in self.weights.values()):
            raise ConfigError(f"stage.weights: expected shares of {', '.join(tasks)}, found {self.weights}")

    def __len__(self) -> int:
        return self.stage.steps * self.stage.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        stage = self.stage
        rng = worlds.generator(self.seed, self.number, index)
        samples, left = [], stage.frames
        for number in range(stage.frames):
            if left < (stage.min_seconds if stage.tokens else 1):
                break
            longest = min(stage.max_seconds, left) if stage.tokens else stage.max_seconds
            limits = worlds.WorldConfig(stage.min_seconds, longest, stage.seconds_per_event)
            key = (index * stage.frames + number) * 16 + self.number
            world = worlds.make_world(self.seed, key, limits)
            sample = self._dialogue(world, rng) if stage.tokens else self._clip(world, rng)
            if sample is not None:
                samples.append(sample)
                left -= len(sample.frames)
        return lay_row(samples, stage, self.vision, self.vocabulary)

    def _dialogue(self, world: worlds.World, rng: np.random.Generator) -> Sample | None:
        dialogue = worlds.sample_dialogue(world, rng, self.weights)
        if dialogue is None:  # nothing happens that could be talked about
            return None
        rendering = self.protocol.render(turns_of(dialogue, world.duration))
        return self._sample(world, range(world.duration), rendering)

    def _clip(self, world: worlds.World, rng: np.random.Generator) -> Sample:
        """A few frames around an event, where there is most to name."""
        last = world.duration - VISION_CLIP
        start = int(rng.integers(0, last + 1))
        if world.events:
            event = world.events[int(rng.integers(len(world.events)))]
            start = min(max(event.start_frame - int(rng.integers(1, VISION_CLIP)), 0), last)
        nothing = np.zeros(0, np.int32)
        zeros = np.zeros(VISION_CLIP, np.int32)
        rendering = Rendering(nothing, nothing, nothing, nothing, decisions=zeros, ends=zeros)
        return self._sample(world, range(start, start + VISION_CLIP), rendering)

    def _sample(self, world: worlds.World, times: range, rendering: Rendering) -> Sample:
        render = worlds.Renderer(world, max(self.vision.frame_size))
        frames = np.stack([fit(render(float(t)), self.vision) for t in times])
        if self.vocabulary is None or not isinstance(self.vision, SiglipConfig):
            return Sample(rendering, frames)
        words, happenings = zip(*(scene_labels(world, t, self.vision.grid) for t in times), strict=True)
        return Sample(rendering, frames, np.stack(words), np.stack(happenings))


# --------------------------------------------------------------------------------------------------------- real videos


class VideoRows:
    """Rows of dialogues over video files; a row is filled with whole dialogues, the longest first.

    A video that cannot be read is left out with a warning that names it.

    Args:
        path: a raw-schema file; relative video paths start at its folder.

    Raises:
        DialogueError: where the file cannot be read, or holds no dialogue whose video can be opened.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        stage: StageConfig,
        protocol: StreamProtocol,
        vision: VisionConfig,
        seed: int = 0,
    ):
        self.stage, self.protocol, self.vision = stage, protocol, vision
        self.folder = pathlib.Path(path).parent
        self.dialogues = [d for d in map(self._with_duration, read_raw(path)) if d is not None]
        if not self.dialogues:
            raise DialogueError(f"{path}: expected dialogues over videos that can be opened, found none")
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(self.dialogues))
        self.rows: list[list[int]] = []
        room: list[int] = []
        for i in sorted(order, key=lambda i: -self.num_frames(self.dialogues[i])):  # first fit, longest first
            need = self.num_frames(self.dialogues[i])
            open_rows = range(max(0, len(room) - _OPEN_ROWS), len(room))
            row = next((r for r in open_rows if room[r] >= need), None)
            if row is None:
                row = len(room)
                room.append(stage.frames)
                self.rows.append([])
            room[row] -= need
            self.rows[row].append(int(i))

    def num_frames(self, dialogue: Dialogue) -> int:
        return min(max(int(np.ceil(dialogue.duration or 0)), 1), self.stage.frames)

    def _with_duration(self, dialogue: Dialogue) -> Dialogue | None:
        """Asks the video for its length where the annotations do not say it."""
        if dialogue.duration:
            return dialogue
        try:
            with open_video(self.folder / dialogue.video) as video:
                return dataclasses.replace(dialogue, duration=float(video.num_frames or self.stage.frames))
        except VideoError as error:
            logging.warning("left out: %s", error)
            return None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        samples = []
        for i in self.rows[index]:
            dialogue = self.dialogues[i]
            try:
                frames = self._frames(dialogue)
            except VideoError as error:
                logging.warning("left out: %s", error)
                continue
            samples.append(Sample(self.protocol.render(turns_of(dialogue, len(frames))), frames))
        return lay_row(samples, self.stage, self.vision)

    def _frames(self, dialogue: Dialogue) -> np.ndarray:
        limit = self.num_frames(dialogue)
        frames = []
        with open_video(self.folder / dialogue.video) as video:
            for frame in video:
                frames.append(fit(frame.image, self.vision))
                if len(frames) == limit:
                    break
        return np.stack(frames)


def batches(rows: WorldRows | VideoRows, batch: int, seed: int, workers: int) -> grain.DatasetIterator:
    """An endless iterator of batches whose state can be saved and restored to the exact next batch.

    Args:
        rows: made in worker processes when `workers` > 0, else in this one.
        batch: B.
        seed: of the order of rows.
    """
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(rows).shuffle(seed).repeat().batch(batch).to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags of its own, also where no command has parsed any
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(dataset)


def _end_with_parent(index: int, count: int) -> None:
    """Lets a worker end when the process that reads from it is gone, killed ones included."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, which then closes its workers
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
