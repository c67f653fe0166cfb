"""The decoder: Llama 3, Qwen2.5, Qwen3 or a tiny model of the same build, by configuration.

One forward serves training (whole packed rows, no cache) and the live stream (a few new tokens against a cache). Layers
are unrolled in Python: scanning over them would copy the cache or the weights on some backends (docs/design.md).
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jstream.config import DecoderConfig
from jstream.models import attention, rope
from jstream.models.cache import Cache, View, write, write_positions
from jstream.models.layers import Linear, RMSNorm, SwiGLU
from jstream.sharding import gather_rows, keep_rows


class Angles(NamedTuple):
    """f32 [B, T, H/2]: by which the new tokens are turned, and their queries for the sinks where those have moved."""

    own: jax.Array
    of_sinks: jax.Array | None


class SelfAttention(nn.Module):
    config: DecoderConfig
    attention: str = "xla"

    @nn.compact
    def __call__(self, x_BTD, angles: Angles, positions_BT, segments_BT, cache: Cache | None, view, layer: int):
        c = self.config
        batch, length, _ = x_BTD.shape
        project = lambda heads, name: Linear(heads * c.head_dim, c.qkv_bias, c.int8, name=name)(x_BTD).reshape(
            batch, length, heads, c.head_dim
        )
        q_BTNH, k_BTKH = project(c.num_heads, "q_proj"), project(c.num_kv_heads, "k_proj")
        v_BTKH = project(c.num_kv_heads, "v_proj")
        if c.qk_norm:
            q_BTNH, k_BTKH = RMSNorm(c.norm_eps, name="q_norm")(q_BTNH), RMSNorm(c.norm_eps, name="k_norm")(k_BTKH)
        of_sinks = None if angles.of_sinks is None else rope.rotate(q_BTNH, angles.of_sinks)
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, angles.own), rope.rotate(k_BTKH, angles.own)
        if cache is None:
            out = attention.attend_packed(q_BTNH, k_BTKH, v_BTKH, positions_BT, segments_BT, self.attention)
        else:
            cache = write(cache, view, layer, k_BTKH, v_BTKH)
            out = attention.attend_cache(q_BTNH, positions_BT, cache, view, layer, of_sinks, self.attention)
        out = Linear(c.width, int8=c.int8, name="o_proj")(out.reshape(batch, length, -1))
        return out, cache


class DecoderLayer(nn.Module):
    config: DecoderConfig
    attention: str = "xla"

    @nn.compact
    def __call__(self, x_BTD, angles: Angles, positions_BT, segments_BT, cache: Cache | None, view, layer: int):
        c = self.config
        h = RMSNorm(c.norm_eps, name="input_layernorm")(x_BTD)
        h, cache = SelfAttention(c, self.attention, name="self_attn")(
            h, angles, positions_BT, segments_BT, cache, view, layer
        )
        x_BTD = x_BTD + h
        h = RMSNorm(c.norm_eps, name="post_attention_layernorm")(x_BTD)
        return x_BTD + SwiGLU(c.mlp_dim, int8=c.int8, name="mlp")(h), cache


# What the backward pass computes again instead of keeping it from the forward pass.
REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "layer": None}


class Decoder(nn.Module):
    """Token embeddings in, hidden states and the grown cache out.

    Attributes:
        remat: "none", or a key of REMAT; matters where there is a backward pass.
        attention: implementation of `attention.attend_packed`, or with a cache of `attention.attend_cache`.
    """

    config: DecoderConfig
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        c = self.config
        self.embed_tokens = nn.Embed(c.vocab_size, c.width, embedding_init=nn.initializers.normal(0.02))
        layer: Any = DecoderLayer
        if self.remat != "none":  # the index of a layer (argument 7, behind self) is no array
            layer = nn.remat(DecoderLayer, policy=REMAT[self.remat], static_argnums=(7,))
        self.layers = [layer(c, self.attention) for _ in range(c.num_layers)]
        self.norm = RMSNorm(c.norm_eps)
        if not c.tie_embeddings:
            self.lm_head = Linear(c.vocab_size, int8=c.int8)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        return jnp.take(gather_rows(self.embed_tokens.embedding), tokens_BT, axis=0)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f32 [..., V]: what follows each hidden state [..., D]."""
        hidden = keep_rows(hidden)
        out = keep_rows(self.embed_tokens.attend(hidden) if self.config.tie_embeddings else self.lm_head(hidden))
        return out.astype(jnp.float32)

    def __call__(
        self,
        embeds_BTD: jax.Array,
        positions_BT: jax.Array,
        rope_positions: jax.Array,
        segments_BT: jax.Array | None = None,
        cache: Cache | None = None,
        view: View | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """One forward.

        Args:
            embeds_BTD: token embeddings with frame tokens in place; with deep layers [B, T, (1 + deep_layers) · D],
                behind the embedding what is added after each of the first layers.
            positions_BT: int32: index in the stream (or in the segment), EMPTY for padding.
            rope_positions: int32 [3, B, T] (`rope.rope_positions`).
            segments_BT: int32: which dialogue of a packed row; needed without a cache.
            cache: where the tokens of earlier forwards are.
            view: where in the cache the T new tokens go, and what they see; the caller has checked the room.

        Returns:
            Hidden states after the final norm [B, T, D], and the cache.
        """
        c = self.config
        turn = lambda positions: rope.rotary_angles(
            positions, c.head_dim, c.rope_theta, c.mrope_section, c.mrope_interleaved
        )
        sink_rope = None if view is None else view.sink_rope
        angles = Angles(turn(rope_positions), None if sink_rope is None else turn(sink_rope))
        if cache is not None:
            assert view is not None
            cache = write_positions(cache, view, positions_BT)
        elif segments_BT is None:
            segments_BT = jnp.zeros_like(positions_BT)
        x_BTD, *deep = jnp.split(embeds_BTD, 1 + c.deep_layers, axis=-1)
        for index, layer in enumerate(self.layers):
            x_BTD, cache = layer(keep_rows(x_BTD), angles, positions_BT, segments_BT, cache, view, index)
            if index < c.deep_layers:
                x_BTD += deep[index]
        return self.norm(keep_rows(x_BTD)), cache
