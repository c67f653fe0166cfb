"""The optimizer: AdamW, or Muon for matrices with AdamW for the rest, under a schedule that follows the stages."""

import jax
import jax.numpy as jnp
import optax

from jstream.config import TrainConfig


def stage_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate over all steps of all stages: linear warm-up, flat, linear decay at the end of each stage."""
    schedules, boundaries, end = [], [], 0
    for stage in config.stages:
        warmup = min(config.warmup, stage.steps // 4)
        falling = int(stage.decay * stage.steps)
        peak = stage.learning_rate
        schedules.append(
            optax.join_schedules(
                [
                    optax.linear_schedule(0.1 * peak, peak, warmup),
                    optax.constant_schedule(peak),
                    optax.linear_schedule(peak, stage.final_rate * peak, max(falling, 1)),
                ],
                [warmup, max(stage.steps - falling, warmup)],
            )
        )
        end += stage.steps
        boundaries.append(end)
    return optax.join_schedules(schedules, boundaries[:-1])


def _is_hidden_matrix(path: tuple, param: jax.Array) -> bool:
    """Muon's domain: kernels between hidden layers; not embeddings, heads, convolutions or auxiliary heads."""
    names = [str(getattr(key, "key", key)) for key in path]
    return param.ndim == 2 and names[-1] == "kernel" and "lm_head" not in names


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """The gradient transformation of a run."""
    schedule = stage_schedule(config)
    if config.optimizer == "adamw":
        decays = lambda params: jax.tree.map(lambda p: p.ndim >= 2, params)
        update = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay, mask=decays)
    else:
        matrices = lambda params: jax.tree_util.tree_map_with_path(
            lambda path, p: optax.contrib.MuonDimensionNumbers() if _is_hidden_matrix(path, p) else None, params
        )
        update = optax.contrib.muon(
            schedule,
            weight_decay=config.weight_decay,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,  # updates as large as AdamW's (arXiv 2502.16982): one schedule serves both
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate at a step of the whole run."""
    return float(stage_schedule(config)(jnp.asarray(step)))  # type: ignore[arg-type]
