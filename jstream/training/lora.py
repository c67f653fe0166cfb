"""Low-rank adapters (LoRA, arXiv 2106.09685): applied beside frozen kernels in training, merged for streaming.

The network does not know them. While it runs, each linear layer that has an adapter gets its product added; only the
two small matrices have gradients, and the gradient of the kernel is never formed.
"""

import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jstream.config import ConfigError, LoraConfig
from jstream.models.layers import Linear

PREFIX = "lora/"  # of adapters among the trained params: lora/decoder/layers_0/self_attn/q_proj/a


def adapted(params: Mapping[str, Any], config: LoraConfig) -> list[str]:
    """Paths of the decoder's kernels that have an adapter.

    Args:
        params: path → array or shape.

    Raises:
        ConfigError: a module occurs nowhere.
    """
    if not config.rank:
        return []
    paths = [path for path in params if path.startswith("decoder/") and path.endswith("/kernel")]
    module = lambda path: path.split("/")[-2]
    for name in config.modules:
        if not any(module(path) == name for path in paths):
            known = ", ".join(sorted({module(path) for path in paths}))
            raise ConfigError(f"lora.modules: expected some of {known}, found {name!r}")
    return [path for path in paths if module(path) in config.modules]


def init_adapters(params: Mapping[str, Any], config: LoraConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh adapters that change nothing yet: A as a linear layer's kernel, B zero.

    Returns:
        `lora/<path of the layer>/a` f32 [in, rank] and `…/b` f32 [rank, out].
    """
    adapters = {}
    for path in adapted(params, config):
        rows, columns = params[path].shape
        layer = PREFIX + path.removesuffix("/kernel")
        own_key = jax.random.fold_in(key, zlib.crc32(path.encode()))  # whatever else has an adapter
        adapters[f"{layer}/a"] = nn.initializers.he_uniform()(own_key, (rows, config.rank))
        adapters[f"{layer}/b"] = jnp.zeros((config.rank, columns))
    return adapters


def beside(adapters: Mapping[str, jax.Array], config: LoraConfig, key: jax.Array | None = None):
    """A context in which the linear layers of the network add their adapters' products.

    Args:
        adapters: as `init_adapters` names them.
        key: of the dropout; None drops nothing.
    """

    def add(layer, args, kwargs, context):
        out = layer(*args, **kwargs)
        path = "/".join(context.module.path)
        if not isinstance(context.module, Linear) or context.method_name != "__call__":
            return out
        if f"{PREFIX}{path}/a" not in adapters:
            return out
        (x,) = args
        a, b = (adapters[f"{PREFIX}{path}/{side}"].astype(x.dtype) for side in "ab")
        if key is not None and config.dropout:
            kept = jax.random.bernoulli(jax.random.fold_in(key, zlib.crc32(path.encode())), 1 - config.dropout, x.shape)
            x = jnp.where(kept, x / (1 - config.dropout), 0)
        return out + ((x @ a) @ b * (config.alpha / config.rank)).astype(out.dtype)

    return nn.intercept_methods(add)


def merge(
    params: Mapping[str, jax.Array], adapters: Mapping[str, jax.Array], config: LoraConfig
) -> dict[str, jax.Array]:
    """Params with the adapters added to their kernels, in f32, each in the dtype of its kernel."""
    merged = dict(params)
    for path in adapted(params, config):
        layer = PREFIX + path.removesuffix("/kernel")
        a, b = (adapters[f"{layer}/{side}"].astype(jnp.float32) for side in "ab")
        kernel = params[path]
        merged[path] = (kernel.astype(jnp.float32) + config.alpha / config.rank * (a @ b)).astype(kernel.dtype)
    return merged
