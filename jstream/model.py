"""`Model`: what `jstream.load` gives and a `Session` takes."""

import dataclasses
from typing import Any

from jstream.config import ModelConfig
from jstream.protocols.streamo import Streamo


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
    protocol: Streamo
