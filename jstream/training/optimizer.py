"""The optimizers over a flat dict of params (path → array), under a schedule that follows the stages."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jstream.config import TrainConfig

BLOCK = 256  # values of an 8-bit moment that share a scale


def stage_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate over all steps of all stages: linear warm-up, flat, falling at the end of each stage."""
    schedules, boundaries, end = [], [], 0
    for stage in config.stages:
        warmup = min(int(config.warmup if config.warmup >= 1 else config.warmup * stage.steps), stage.steps // 4)
        falling = min(int(stage.decay * stage.steps), stage.steps - warmup)
        peak, lowest = stage.learning_rate, stage.final_rate
        fall = (
            optax.linear_schedule(peak, lowest * peak, max(falling, 1))
            if stage.falling == "linear"
            else optax.cosine_decay_schedule(peak, max(falling, 1), lowest)
        )
        schedules.append(
            optax.join_schedules(
                [optax.linear_schedule(0.1 * peak, peak, warmup), optax.constant_schedule(peak), fall],
                [warmup, stage.steps - falling],
            )
        )
        end += stage.steps
        boundaries.append(end)
    return optax.join_schedules(schedules, boundaries[:-1])


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step of the whole run."""
    return float(stage_schedule(config)(jnp.asarray(step)))  # type: ignore[arg-type]


def _is_hidden_matrix(path: str, param: jax.Array) -> bool:
    """Muon's domain: kernels between hidden layers; not embeddings, heads, convolutions or adapters."""
    return param.ndim == 2 and path.endswith("/kernel") and "lm_head" not in path


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The gradient transformation of a run, over a flat dict of the params that it trains."""
    schedule = stage_schedule(config)
    decays = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
    if config.optimizer == "muon":
        matrices = lambda params: jax.tree_util.tree_map_with_path(  # what is masked is no leaf
            lambda path, p: optax.contrib.MuonDimensionNumbers() if _is_hidden_matrix(path[-1].key, p) else None, params
        )
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as AdamW's (arXiv 2502.16982): one schedule serves both
        )
    elif config.optimizer == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(),  # the second moment by rows and columns (arXiv 1804.04235)
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(schedule),
        )
    else:
        adam = scale_by_adam_8bit if config.optimizer == "adamw_8bit" else optax.scale_by_adam
        update = optax.chain(
            adam(b2=config.beta2),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(schedule),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


# ------------------------------------------------------------------------------------------------------ 8-bit moments


class Adam8bitState(NamedTuple):
    """Adam's moments at 2 bytes a param in place of 8; each is a tree of the params' structure.

    Attributes:
        count: int32 []: steps taken.
        mu, nu: int8 first moment; uint8 root of the second: of a param's shape.
        mu_scale, nu_scale: f32 [..., blocks]: the value of 1, for each BLOCK of the last dimension.
    """

    count: jax.Array
    mu: Any
    nu: Any
    mu_scale: Any
    nu_scale: Any


def _blocks(x: jax.Array) -> jax.Array:
    """[..., D] → [..., D / block, block]; a dimension that is no multiple of BLOCK is one block."""
    x = jnp.atleast_1d(x)
    size = BLOCK if x.shape[-1] % BLOCK == 0 else x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, size)


def _quantize(x: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Whole numbers up to the largest of `dtype`, and their scales.

    Unsigned values are rounded up: a second moment that vanishes would make the next update boundless.
    """
    blocks = _blocks(x)
    largest = jnp.iinfo(dtype).max
    scale = jnp.max(jnp.abs(blocks), axis=-1) / largest
    exact = blocks / jnp.maximum(scale, 1e-30)[..., None]
    rounded = jnp.ceil(exact - 1e-3) if dtype == jnp.uint8 else jnp.round(exact)
    return jnp.clip(rounded, -largest, largest).astype(dtype).reshape(x.shape), scale


def _restore(values: jax.Array, scale: jax.Array) -> jax.Array:
    return (_blocks(values).astype(jnp.float32) * scale[..., None]).reshape(values.shape)


def scale_by_adam_8bit(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> optax.GradientTransformation:
    """Adam whose moments rest in 8 bits between steps, with a scale for each block (after arXiv 2110.02861).

    The second moment is stored as its root, which halves the range that 8 bits have to span.
    """

    def init(params):
        zeros = lambda dtype: jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)
        scales = lambda: jax.tree.map(lambda p: jnp.zeros(jax.eval_shape(_blocks, p).shape[:-1], jnp.float32), params)
        return Adam8bitState(jnp.zeros((), jnp.int32), zeros(jnp.int8), zeros(jnp.uint8), scales(), scales())

    def update(updates, state, params=None):
        del params
        count = state.count + 1

        def one(g, mu, nu, mu_scale, nu_scale):
            g = g.astype(jnp.float32)
            mu = b1 * _restore(mu, mu_scale) + (1 - b1) * g
            nu = b2 * _restore(nu, nu_scale) ** 2 + (1 - b2) * g * g
            step = (mu / (1 - b1**count)) / (jnp.sqrt(nu / (1 - b2**count)) + eps)
            (mu, mu_scale), (nu, nu_scale) = _quantize(mu, jnp.int8), _quantize(jnp.sqrt(nu), jnp.uint8)
            return step, mu, nu, mu_scale, nu_scale

        rows = jax.tree.map(one, updates, state.mu, state.nu, state.mu_scale, state.nu_scale)
        step, mu, nu, mu_scale, nu_scale = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0,) * 5), rows
        )
        return step, Adam8bitState(count, mu, nu, mu_scale, nu_scale)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]
