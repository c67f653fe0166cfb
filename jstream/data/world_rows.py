"""Rows of the world, rendered as they are asked for."""

import numpy as np

from jstream.config import ConfigError, SiglipConfig, StageConfig, VisionConfig
from jstream.data import world as worlds
from jstream.data.frames import fit
from jstream.data.rows import Sample, lay_row
from jstream.data.world.labels import WORDS, scene_labels
from jstream.protocols.protocol import Rendering, StreamProtocol
from jstream.protocols.streamo import turns_of

VISION_CLIP = 6  # consecutive frames of one video where the vision tower is trained alone; the first is context only


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
        return lay_row(samples, stage, self.vision, self.vocabulary, index)

    def describe(self, index: int) -> str:
        """What a row is made of, for messages."""
        return f"world row {index} of stage {self.number}"

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
