"""The small modules that the vision tower and the decoder are made of.

Everything is a Flax Linen module over plain dict params. Kernels are two-dimensional `[in, out]`, as in the checkpoints
they are loaded from (transposed), so that one table of rules shards them and one optimizer rule fits them.
"""

import functools

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


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x W for x [..., I] and W [I, O].

    The gradient of W is written as xᵀ dy. JAX's own rule has dy first, and XLA on a CPU then works dy out once more,
    against the order of memory, for every kernel that reads the same x.
    """
    return x @ kernel


def _matmul_gradients(kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    return dy @ kernel.T, jnp.einsum("...i,...o->io", x, dy)


matmul.defvjp(lambda x, kernel: (x @ kernel, (x, kernel)), _matmul_gradients)


class Linear(nn.Module):
    """x W + b, or with int8 weights (x W) · s + b: each column of W is whole numbers times its scale.

    Attributes:
        features: columns of W.
        int8: whether the kernel is int8, with a `kernel_scale`; half the bytes of bfloat16 to read.
    """

    features: int
    use_bias: bool = False
    int8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if not self.int8:
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
            x = matmul(x, kernel.astype(x.dtype))
        else:
            kernel = self.param("kernel", nn.initializers.zeros, (x.shape[-1], self.features), jnp.int8)
            scale = self.param("kernel_scale", nn.initializers.ones, (self.features,))
            x = (x @ kernel.astype(x.dtype)) * scale.astype(x.dtype)
        if self.use_bias:
            x = x + self.param("bias", nn.initializers.zeros, (self.features,)).astype(x.dtype)
        return x


class SwiGLU(nn.Module):
    """The gated feed-forward of Llama: down(silu(gate(x)) · up(x))."""

    hidden: int
    use_bias: bool = False
    int8: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        linear = functools.partial(Linear, use_bias=self.use_bias, int8=self.int8)
        gate, up = linear(self.hidden, name="gate_proj")(x), linear(self.hidden, name="up_proj")(x)
        return linear(x.shape[-1], name="down_proj")(nn.silu(gate) * up)


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
