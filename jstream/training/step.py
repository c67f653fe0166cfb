"""The training step: a pure function of (state, frozen params, batch), jitted once a stage.

frames → vision tower → features → projector → frame tokens ─┐
tokens ───────────────────────────────────────────────────────┴→ decoder → scores → losses → gradients → optimizer

A batch that brings features enters there, and no tower runs.

Params are a flat dict from path to array. Those that no stage trains are an argument that never comes back: they have
no gradients, no optimizer state, and do not stand in checkpoints.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jstream.config import ConfigError, ModelConfig, SiglipConfig, StageConfig, TrainConfig
from jstream.models.attention import implementation_for
from jstream.models.rope import packed_rope_positions
from jstream.models.video_lm import init_params, param_dtype, run, stack_frames
from jstream.training import lora, losses
from jstream.training.optimizer import make_optimizer
from jstream.weights.hf import flat, unflat

AUXILIARY = "auxiliary/"  # of the heads that exist in training only
PATCHES_AT_ONCE = 1 << 15  # of a row's frames in the vision tower: about 60 frames of the published models

Params = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
        trained: path → param.
        opt_state: the optimizer's.
        step: int32 []: steps taken, over all stages.
    """

    trained: Params
    opt_state: Any
    step: jax.Array


class AuxiliaryHeads(nn.Module):
    """Reads names out of hidden states through the decoder's word embeddings; used in training only."""

    width: int

    @nn.compact
    def __call__(self, frame_tokens: jax.Array, decisions: jax.Array, embeddings_WD: jax.Array):
        """Logits of W words.

        Args:
            frame_tokens: [..., M, D].
            decisions: [..., D]: the decoder's hidden states where turns are decided.
            embeddings_WD: word embeddings.

        Returns:
            [..., M, W]: what each frame token shows; [..., 2, W]: events in progress and events just over.
        """

        def name(x, tag):
            scale = self.param(f"{tag}_scale", nn.initializers.constant(3.0), ())
            bias = self.param(f"{tag}_bias", nn.initializers.constant(-3.0), (embeddings_WD.shape[0],))
            x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
            return scale * jnp.einsum("...d,wd->...w", x, embeddings_WD) + bias

        shown = name(frame_tokens, "words")
        happening = nn.Dense(2 * self.width, name="happenings")(decisions)
        happening = name(happening.reshape(*happening.shape[:-1], 2, self.width), "happenings")
        return shown, happening


# -------------------------------------------------------------------------------------------------------- the params


def fresh_params(config: TrainConfig, key: jax.Array, num_words: int) -> Params:
    """All params of a run that starts from nothing: the model's, its adapters, and where a stage needs them the
    auxiliary heads, f32.

    Args:
        num_words: W of the auxiliary losses.
    """
    model_key, other_key = jax.random.split(key)
    params = flat(init_params(config.model, model_key))
    params |= lora.init_adapters(params, config.lora, other_key)
    if any(stage.objective.needs_names for stage in config.stages):
        width = config.model.decoder.width
        heads = AuxiliaryHeads(width).init(
            other_key, jnp.zeros((1, 1, width)), jnp.zeros((1, width)), jnp.zeros((num_words, width))
        )
        params |= {AUXILIARY + path: param for path, param in flat(heads["params"]).items()}
    return params


def model_params(params: Mapping[str, Any]) -> Params:
    """Those of the network, without adapters and auxiliary heads."""
    return {path: x for path, x in params.items() if not path.startswith((lora.PREFIX, AUXILIARY))}


def frozen_in(stage: StageConfig, path: str) -> bool:
    own = path.startswith((lora.PREFIX, AUXILIARY))
    return not own and any(re.fullmatch(pattern, path) for pattern in stage.freeze)


def divide(config: TrainConfig, params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The params that some stage trains, and those that none does.

    Args:
        params: path → array or shape.

    Raises:
        ConfigError: a pattern fits nothing, or adapters stand beside kernels that are trained themselves.
    """
    for stage in config.stages:
        for pattern in stage.freeze:
            if not any(re.fullmatch(pattern, path) for path in params):
                raise ConfigError(f"stage.freeze: {pattern!r} fits no param; paths look like {next(iter(params))}")
    frozen = {path: x for path, x in params.items() if all(frozen_in(stage, path) for stage in config.stages)}
    trained = {path: x for path, x in params.items() if path not in frozen}
    both = [path for path in lora.adapted(params, config.lora) if path in trained]
    if both:
        raise ConfigError(f"lora: expected {both[0]} to be frozen, as it has an adapter; add it to every stage.freeze")
    whole = [path for path, x in trained.items() if jnp.issubdtype(x.dtype, jnp.integer)]
    if whole:
        raise ConfigError(f"model.decoder.int8: expected {whole[0]} to be frozen, as whole numbers have no gradient")
    return trained, frozen


def prepare(
    config: TrainConfig, key: jax.Array, num_words: int, given: Mapping[str, jax.Array] | None = None
) -> tuple[TrainState, Params]:
    """The state before the first step, and the params that are never trained; traceable, so that it can be jitted.

    Args:
        given: params of the model to start from, in place of fresh ones.

    Returns:
        Trained params in `param_dtype`, frozen ones in `compute_dtype`.
    """
    params = fresh_params(config, key, num_words) | dict(given or {})
    trained, frozen = divide(config, params)
    of = lambda params, dtype: {path: x.astype(param_dtype(x, dtype)) for path, x in params.items()}
    trained = of(trained, config.param_dtype)
    opt_state = make_optimizer(config).init(trained)
    return TrainState(trained, opt_state, jnp.zeros((), jnp.int32)), of(frozen, config.compute_dtype)


# ----------------------------------------------------------------------------------------------------------- the loss


def with_weights(
    batch: Mapping[str, jax.Array], stage: StageConfig, state_ids: tuple[int, ...]
) -> dict[str, jax.Array]:
    """The batch with what the losses need to know of all of it: `states`, `weights` [B, T] and `shares` f32 [B, F]."""
    states, weights = losses.token_weights(
        batch["labels"], batch["kinds"], batch["segments"], stage.objective, state_ids, stage.frames
    )
    used = batch["decisions"] >= 0
    return {**batch, "states": states, "weights": weights, "shares": used / jnp.maximum(jnp.sum(used), 1)}


def embed_frames(config: TrainConfig, params: Params, batch: Mapping[str, jax.Array]) -> jax.Array:
    """Frame tokens [B, F · M, E] of packed rows; where a row has many patches, some of its frames after the others.

    Where the rows bring features, the tower's part is done.
    """
    model: ModelConfig = config.model
    if "features" in batch:
        features = batch["features"].astype(config.compute_dtype)
        rows, num_frames, *size = features.shape
        tokens = run(model, unflat(model_params(params)), features.reshape(-1, *size), method="project")
        return tokens.reshape(rows, -1, tokens.shape[-1])
    images = stack_frames(batch["frames"], batch["first"], model.vision.num_images)
    rows, num_frames, *size = images.shape

    def embed(images):
        tokens = run(model, unflat(model_params(params)), images.reshape(-1, *size), method="embed_frames")
        return tokens.reshape(rows, -1, tokens.shape[-1])

    patches = math.prod(model.vision.frame_size) // model.vision.patch_size**2
    at_once = max(PATCHES_AT_ONCE // patches, 1)
    if num_frames <= at_once:
        return embed(images)
    parts = -(-num_frames // at_once)
    images = jnp.pad(images, ((0, 0), (0, parts * at_once - num_frames), (0, 0), (0, 0), (0, 0)))
    images = jnp.moveaxis(images.reshape(rows, parts, at_once, *size), 1, 0)
    tokens = jnp.moveaxis(jax.lax.map(jax.checkpoint(embed), images), 0, 1)
    return tokens.reshape(rows, -1, tokens.shape[-1])[:, : num_frames * model.vision.tokens_per_frame]


def embed_row(config: TrainConfig, params: Params, batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Frame tokens [B, F · M, E] and the decoder's hidden states [B, T, D] of packed rows; params in compute dtype."""
    model: ModelConfig = config.model
    network = functools.partial(run, model, unflat(model_params(params)))
    frame_tokens = embed_frames(config, params, batch)
    embeds = network(batch["tokens"], batch["is_frame"], frame_tokens, method="embed_tokens")
    multimodal = bool(model.decoder.mrope_section)
    rope = packed_rope_positions(batch["is_frame"], batch["positions"], model.vision.token_grid, multimodal)
    attention = config.attention
    if attention == "auto":
        attention = implementation_for(jax.default_backend(), model.decoder.head_dim, config.compute_dtype)
    how = {"remat": config.remat, "attention": attention}
    hidden, _ = network(embeds, batch["positions"], rope, batch["segments"], method="hidden", **how)
    return frame_tokens, hidden


def head_of(config: TrainConfig, params: Params) -> Callable[[jax.Array], jax.Array]:
    """Hidden states → logits. The cast to the compute dtype is inside, so that gradients of blocks add up in f32."""
    head = {path: x for path, x in params.items() if path.startswith(("decoder/embed_tokens", "decoder/lm_head"))}
    return lambda hidden: run(config.model, unflat(computed(config, head)), hidden, method="logits")


def computed(config: TrainConfig, params: Params) -> Params:
    """Params in the dtype of the forward pass."""
    return {path: x.astype(param_dtype(x, config.compute_dtype)) for path, x in params.items()}


def batch_loss(
    trained: Params,
    frozen: Params,
    batch: Mapping[str, jax.Array],
    config: TrainConfig,
    stage: StageConfig,
    key: jax.Array | None = None,
) -> tuple[jax.Array, losses.Sums]:
    """The objective of packed rows (`data.rows` says what a row holds).

    Args:
        batch: with what `with_weights` adds; a part of a batch gives its part of the loss.
        key: of the adapters' dropout; None drops nothing.

    Returns:
        The loss, and sums for the metrics.
    """
    objective = stage.objective
    params = {path: jax.lax.stop_gradient(x) if frozen_in(stage, path) else x for path, x in trained.items()} | frozen
    adapters = {path: x for path, x in params.items() if path.startswith(lora.PREFIX)}
    with lora.beside(adapters, config.lora, key) if adapters else contextlib.nullcontext():
        batch_size, num_frames = batch["first"].shape
        width = config.model.decoder.width
        if objective.needs_decoder:
            frame_tokens, hidden = embed_row(config, computed(config, params), batch)
            scores = losses.token_scores(hidden, batch["labels"], head_of(config, params))
            loss, sums = losses.language_loss(*scores, batch["kinds"], batch["states"], batch["weights"], objective)
            loss *= objective.replies
            decided = jnp.take_along_axis(hidden, jnp.maximum(batch["decisions"], 0)[..., None], axis=1)
        else:
            frame_tokens = embed_frames(config, computed(config, params), batch)
            loss, sums, decided = jnp.zeros(()), {}, jnp.zeros((batch_size, num_frames, width))

    if objective.needs_names:
        embeddings = params["decoder/embed_tokens/embedding"][batch["vocabulary"][0]]
        own = {path.removeprefix(AUXILIARY): x for path, x in params.items() if path.startswith(AUXILIARY)}
        heads: Any = AuxiliaryHeads(width).apply
        shown, happening = heads(
            {"params": unflat(own)},
            frame_tokens.reshape(batch_size, num_frames, -1, frame_tokens.shape[-1])[..., :width],
            decided,
            embeddings,
        )
        targets, shares = batch["words"], batch["shares"]
        if isinstance(config.model.vision, SiglipConfig) and config.model.vision.pooled_token:
            # it names the events in progress, wherever they are
            targets = jnp.concatenate([batch["happenings"][:, :, :1], targets], axis=2)
        spread = lambda share, shape: jnp.broadcast_to(share[..., None] / shape[2], shape[:3])
        words, sums["words_f1"] = losses.naming_loss(shown, targets, spread(shares, shown.shape))
        loss += objective.words * words
        if objective.happenings:
            happenings, sums["happenings_f1"] = losses.naming_loss(
                happening, batch["happenings"], spread(shares, happening.shape)
            )
            loss += objective.happenings * happenings
    return loss, sums | {"loss": (loss, jnp.ones(()))}


# ----------------------------------------------------------------------------------------------------------- the step


def make_train_step(
    config: TrainConfig, stage: StageConfig, state_ids: tuple[int, ...], places: TrainState | None = None
) -> Callable:
    """One optimizer step of a stage: (state, frozen, batch) → (next state, metrics); donates the state.

    Where the rows go through the model in parts, a part holds every n-th row, so that no row changes its device.

    Args:
        state_ids: token ids of the states (`StreamProtocol.decision_ids`).
        places: a tree of shardings for the state; by default it stays where the compiler likes it.
    """
    optimizer = make_optimizer(config)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if places is None else (places, None))
    def train_step(
        state: TrainState, frozen: Params, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        whole = with_weights(batch, stage, state_ids)
        key = jax.random.fold_in(jax.random.key(config.seed), state.step) if config.lora.dropout else None
        gradient = jax.grad(batch_loss, has_aux=True)

        def placed(gradients, sums):  # as the params: nothing else would say where a sum of parts should lie
            if places is None:
                return gradients, sums
            return jax.lax.with_sharding_constraint(gradients, places.trained), sums

        def part(number):
            take = lambda x: x.reshape(len(x) // stage.accumulate, stage.accumulate, *x.shape[1:])[:, number]
            part_key = None if key is None else jax.random.fold_in(key, number)
            return placed(*gradient(state.trained, frozen, jax.tree.map(take, whole), config, stage, part_key))

        if stage.accumulate == 1:
            gradients, sums = placed(*gradient(state.trained, frozen, whole, config, stage, key))
        else:
            shapes = jax.eval_shape(part, 0)
            nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda number, total: placed(*jax.tree.map(jnp.add, total, part(number)))
            gradients, sums = jax.lax.fori_loop(0, stage.accumulate, add, nothing)
            sums["loss"] = (sums["loss"][0], jnp.ones(()))

        updates: Any
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
        for path in updates:  # momentum and weight decay would move it without a gradient
            if frozen_in(stage, path):
                updates[path] = jnp.zeros_like(updates[path])
        metrics = {name: total / jnp.maximum(number, 1) for name, (total, number) in sums.items()}
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        return TrainState(optax.apply_updates(state.trained, updates), opt_state, state.step + 1), metrics  # type: ignore[arg-type]

    return train_step
