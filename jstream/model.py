"""`Model`: what `jstream.load` gives and a `Session` takes."""

import dataclasses
from typing import Any

import jax

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

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh that the params lie on; None on one device."""
        mesh = getattr(jax.tree.leaves(self.params)[0].sharding, "mesh", None)
        return mesh if isinstance(mesh, jax.sharding.Mesh) else None

    @property
    def device(self) -> Any:
        """A device that it runs on."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def dtype(self) -> Any:
        """Of the params."""
        return jax.tree.leaves(self.params)[0].dtype

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
