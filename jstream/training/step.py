"""The training step: a pure function of (state, batch), jitted once a stage.

frames → vision tower → projector → frame tokens ─┐
tokens ────────────────────────────────────────────┴→ decoder → logits → losses → gradients → optimizer
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from jstream.config import ModelConfig, ObjectiveConfig, SiglipConfig
from jstream.models.rope import packed_rope_positions
from jstream.models.video_lm import init_params, run, stack_frames
from jstream.training import losses


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step.

    Attributes:
        params: `{"model": …, "auxiliary": …}`; only the model is kept at the end.
        opt_state: the optimizer's.
        step: int32 []: steps taken, over all stages.
    """

    params: Any
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


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, key: jax.Array, num_words: int
) -> TrainState:
    """Fresh params and optimizer state; `num_words` is W of the auxiliary losses."""
    model_key, auxiliary_key = jax.random.split(key)
    width = config.decoder.width
    auxiliary = AuxiliaryHeads(width).init(
        auxiliary_key, jnp.zeros((1, 1, width)), jnp.zeros((1, width)), jnp.zeros((num_words, width))
    )["params"]
    params = {"model": jax.jit(init_params, static_argnums=0)(config, model_key), "auxiliary": auxiliary}
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def batch_loss(
    params: Any,
    batch: dict[str, jax.Array],
    config: ModelConfig,
    objective: ObjectiveConfig,
    state_ids: tuple[int, ...],
    train_vision: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective of one batch of packed rows (`data.pipeline` says what a batch holds).

    Without `train_vision` no gradient reaches the vision tower; the projector always learns.

    Returns:
        The loss, and metrics.
    """
    if not train_vision:
        frozen = jax.lax.stop_gradient(params["model"]["vision"])
        params = params | {"model": params["model"] | {"vision": frozen}}
    model = functools.partial(run, config, params["model"])
    batch_size, num_frames = batch["first"].shape
    images = stack_frames(batch["frames"], batch["first"], config.vision.num_images)
    frame_tokens = model(images.reshape(-1, *images.shape[2:]), method="embed_frames")
    frame_tokens = frame_tokens.reshape(batch_size, -1, frame_tokens.shape[-1])

    loss, metrics = jnp.zeros(()), {}
    decided = jnp.zeros((batch_size, num_frames, config.decoder.width))
    if objective.needs_decoder:
        embeds = model(batch["tokens"], batch["is_frame"], frame_tokens, method="embed_tokens")
        multimodal = bool(config.decoder.mrope_section)
        rope = packed_rope_positions(batch["is_frame"], batch["positions"], config.vision.token_grid, multimodal)
        hidden, _ = model(embeds, batch["positions"], rope, batch["segments"], method="hidden")
        flat = lambda x: x.reshape(-1, *x.shape[2:])
        replies, metrics = losses.language_loss(
            model(flat(hidden), method="logits"),
            flat(batch["labels"]),
            flat(batch["kinds"]) > 0,
            state_ids,
            objective.states,
            objective.gamma,
        )
        loss += objective.replies * replies
        decided = jnp.take_along_axis(hidden, jnp.maximum(batch["decisions"], 0)[..., None], axis=1)

    if objective.needs_names:
        width = config.decoder.width
        embeddings = model(batch["vocabulary"][:1], method="embed_text")[0, :, :width]
        heads: Any = functools.partial(AuxiliaryHeads(config.decoder.width).apply, {"params": params["auxiliary"]})
        shown, happening = heads(
            frame_tokens.reshape(batch_size, num_frames, -1, frame_tokens.shape[-1])[..., :width],
            decided,
            embeddings,
        )
        valid = batch["decisions"] >= 0
        targets = batch["words"]
        if (
            isinstance(config.vision, SiglipConfig) and config.vision.pooled_token
        ):  # it names the events in progress, wherever they are
            targets = jnp.concatenate([batch["happenings"][:, :, :1], targets], axis=2)
        words, metrics["words_f1"] = losses.naming_loss(
            shown, targets, jnp.broadcast_to(valid[..., None], shown.shape[:-1])
        )
        loss += objective.words * words
        if objective.happenings:
            happenings, metrics["happenings_f1"] = losses.naming_loss(
                happening, batch["happenings"], jnp.broadcast_to(valid[..., None], happening.shape[:-1])
            )
            loss += objective.happenings * happenings
    return loss, metrics | {"loss": loss}


@functools.partial(
    jax.jit,
    static_argnames=("config", "objective", "state_ids", "optimizer", "train_vision"),
    donate_argnames=("state",),
)
def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    config: ModelConfig,
    objective: ObjectiveConfig,
    state_ids: tuple[int, ...],
    optimizer: optax.GradientTransformation,
    train_vision: bool = True,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step; returns the next state and the metrics of the batch."""
    gradients, metrics = jax.grad(batch_loss, has_aux=True)(
        state.params, batch, config, objective, state_ids, train_vision
    )
    updates: Any
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    if not train_vision:  # momentum and weight decay would move it without a gradient
        still = jax.tree.map(jnp.zeros_like, updates["model"]["vision"])
        updates = updates | {"model": updates["model"] | {"vision": still}}
    metrics["gradient_norm"] = optax.tree.norm(gradients)
    return TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics
