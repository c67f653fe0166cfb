"""The projector between vision tower and decoder: linear, GELU, linear, with biases (VideoLLM-online's connector)."""

import flax.linen as nn
import jax

from jstream.models.layers import MLP


class Projector(nn.Module):
    """Frame features [N, M, vision width] to frame tokens [N, M, D].

    Attributes:
        width: D.
        num_positions: M where every token of a frame has a learned vector of its own added, else 0.
    """

    width: int
    num_positions: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = MLP(self.width, self.width, approximate=False, name="mlp")(x)
        if self.num_positions:
            x += self.param("token_positions", nn.initializers.normal(0.25), (self.num_positions, self.width))
        return x
