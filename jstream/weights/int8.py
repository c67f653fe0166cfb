"""Weights in int8, to stream with: half the bytes of bfloat16, which is what a silent turn mostly waits for.

Only the decoder's linear layers are changed; of the embedding a turn reads a few rows. Each column keeps the largest
magnitude it had (Dettmers et al., 2022, without the outliers' own path).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jstream.config import ModelConfig
from jstream.weights.checkpoint import CheckpointError


def to_int8(config: ModelConfig, params: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """The config and the params with int8 kernels in the decoder.

    Raises:
        CheckpointError: they are int8 already.
    """
    if config.decoder.int8:
        raise CheckpointError("expected a model with float weights, found one with int8 weights")

    def walk(tree: dict[str, Any], name: str = "") -> dict[str, Any]:
        if name == "lm_head" or name.endswith("_proj"):
            kernel, scale = quantize(tree["kernel"])
            return tree | {"kernel": kernel, "kernel_scale": scale}
        return {key: walk(value, key) if isinstance(value, dict) else value for key, value in tree.items()}

    decoder = dataclasses.replace(config.decoder, int8=True)
    return dataclasses.replace(config, decoder=decoder), params | {"decoder": walk(params["decoder"])}


@jax.jit
def quantize(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 [in, out] and the scale of each column, in the kernel's dtype.

    Scales are rounded to bfloat16 before they are used, so that every dtype a model is opened in holds them exactly.
    """
    kernel32 = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel32), axis=0)
    scale = (jnp.where(largest > 0, largest, 1.0) / 127).astype(jnp.bfloat16).astype(jnp.float32)
    whole = jnp.clip(jnp.round(kernel32 / scale), -127, 127).astype(jnp.int8)
    return whole, scale.astype(kernel.dtype)
