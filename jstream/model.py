"""`Model`: what `jstream.load` gives and a `Session` takes."""

import dataclasses
from typing import Any

from jstream.config import ModelConfig, QwenVisionConfig
from jstream.protocols import make_protocol
from jstream.protocols.protocol import StreamProtocol


@dataclasses.dataclass(frozen=True)
class Model:
    """A model ready to stream.

    Attributes:
        config: its shapes.
        params: nested dict of arrays, as `models.video_lm.init_params` makes them.
        protocol: its language, with the tokenizer.
    """

    config: ModelConfig
    params: Any
    protocol: StreamProtocol

    def for_frames(self, height: int, width: int) -> "Model":
        """The same model for a stream of frames of this size in pixels.

        A tower that keeps the aspect has another number of tokens a frame for each size; others stay as they are.
        """
        vision = self.config.vision
        if not isinstance(vision, QwenVisionConfig):
            return self
        vision = vision.for_frames(height, width)
        protocol = make_protocol(self.protocol.config, self.protocol.tokenizer, vision.tokens_per_frame)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, vision=vision), protocol=protocol)
