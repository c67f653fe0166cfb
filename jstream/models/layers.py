"""The small modules that the vision tower and the decoder are made of.

Everything is a Flax Linen module over plain dict params. Kernels are two-dimensional `[in, out]`, as in the checkpoints
they are loaded from (transposed), so that one table of rules shards them and one optimizer rule fits them.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in f32 (Zhang and Sennrich, 2019)."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * scale).astype(x.dtype)


class SwiGLU(nn.Module):
    """The gated feed-forward of Llama: down(silu(gate(x)) · up(x))."""

    hidden: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = nn.Dense(self.hidden, use_bias=self.use_bias, name="gate_proj")(x)
        up = nn.Dense(self.hidden, use_bias=self.use_bias, name="up_proj")(x)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="down_proj")(nn.silu(gate) * up)


class MLP(nn.Module):
    """Two linear layers with a GELU between them.

    Attributes:
        hidden, out: widths.
        approximate: the tanh form of GELU, which SigLIP was trained with.
    """

    hidden: int
    out: int
    approximate: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.hidden, name="fc1")(x)
        return nn.Dense(self.out, name="fc2")(nn.gelu(x, approximate=self.approximate))
