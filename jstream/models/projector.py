"""The projector between vision tower and decoder: linear, GELU, linear, with biases (VideoLLM-online's connector)."""

import flax.linen as nn
import jax

from jstream.models.layers import MLP


class Projector(nn.Module):
    """Frame features [..., vision width] to frame tokens [..., D]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return MLP(self.width, self.width, approximate=False, name="mlp")(x)
