"""The same model in torch, as one would train it with transformers: its Llama, its SigLIP, peft's adapters. Only what
transformers lacks is written here: a stem before the patches, patches of two frames, frame tokens in their places.

Needs the extra `parity`; only `benchmarks/peer.py` imports it.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch  # type: ignore
import transformers  # type: ignore
from torch import nn  # type: ignore
from torch.nn import functional  # type: ignore

from jstream.config import LoraConfig, ModelConfig, SiglipConfig, TrainConfig
from jstream.training import lora
from jstream.weights.hf import CONNECTOR, FAMILIES, plan_of, to_theirs

STEM_CELL = 4  # pixels, as in models/siglip.py


class Stem(nn.Module):
    """What stands in the place of SigLIP's embeddings: cells of 4 px, a 3 × 3 convolution, patches, positions."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        channels, width = 3 * config.temporal_patch_size, config.stem_width
        self.stem_width, patch = width, config.patch_size
        if width:
            self.stem_cells = nn.Conv2d(channels, width, STEM_CELL, STEM_CELL)
            self.stem_conv = nn.Conv2d(width, width, 3, padding=1)
            channels, patch = width, patch // STEM_CELL
        self.patch_embedding = nn.Conv2d(channels, config.width, patch, patch)
        self.position_embedding = nn.Parameter(torch.empty((config.image_size // config.patch_size) ** 2, config.width))

    def forward(self, pixels, interpolate_pos_encoding=False):
        if self.stem_width:
            pixels = functional.gelu(self.stem_cells(pixels), approximate="tanh")
            pixels = functional.gelu(self.stem_conv(pixels), approximate="tanh")
        return self.patch_embedding(pixels).flatten(2).transpose(1, 2) + self.position_embedding


class TorchVideoLM(nn.Module):
    """SigLIP, connector and Llama, joined as `models/video_lm.py` joins them; SDPA attention throughout."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        vision, decoder = config.vision, config.decoder
        assert isinstance(vision, SiglipConfig)
        self.vision_config = vision
        self.vision: Any = transformers.SiglipVisionModel._from_config(
            transformers.SiglipVisionConfig(
                hidden_size=vision.width, intermediate_size=vision.mlp_dim, num_hidden_layers=vision.num_layers,
                num_attention_heads=vision.num_heads, image_size=vision.image_size, patch_size=vision.patch_size,
                layer_norm_eps=vision.norm_eps, vision_use_head=vision.pooled_token,
            ),
            attn_implementation="sdpa",
        )  # fmt: skip
        if vision.stem_width or vision.temporal_patch_size > 1:
            self.vision.embeddings = Stem(vision)
        self.connector = nn.Sequential(
            nn.Linear(vision.width, decoder.width), nn.GELU(), nn.Linear(decoder.width, decoder.width)
        )
        shape = (vision.tokens_per_frame, decoder.width) if vision.token_positions else (1,)
        self.token_positions = nn.Parameter(torch.zeros(shape), requires_grad=vision.token_positions)
        self.llm: Any = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(
                vocab_size=decoder.vocab_size, hidden_size=decoder.width, num_hidden_layers=decoder.num_layers,
                head_dim=decoder.head_dim, num_attention_heads=decoder.num_heads,
                num_key_value_heads=decoder.num_kv_heads, intermediate_size=decoder.mlp_dim,
                rms_norm_eps=decoder.norm_eps, tie_word_embeddings=decoder.tie_embeddings, attention_bias=False,
                rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_theta}, use_cache=False,
            ),
            attn_implementation="sdpa",
        )  # fmt: skip

    def embed_frames(self, frames, first):
        """uint8 [B, F, H, W, 3] → frame tokens [B, F · M, D]."""
        vision = self.vision_config
        if vision.num_images > 1:
            before = torch.where(first[:, :, None, None, None], frames, frames.roll(1, dims=1))
            frames = torch.cat([before, frames], dim=-1)
        pixels = frames.flatten(0, 1).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0  # channels stay the last
        seen = self.vision(pixels)
        side = vision.image_size // vision.patch_size
        patches = seen.last_hidden_state.transpose(1, 2).unflatten(2, (side, side))
        tokens = functional.adaptive_avg_pool2d(patches, vision.grid).flatten(2).transpose(1, 2)
        if vision.pooled_token:
            tokens = torch.cat([seen.pooler_output[:, None], tokens], dim=1)
        tokens = self.connector(tokens)
        if vision.token_positions:
            tokens = tokens + self.token_positions
        return tokens.reshape(len(frames), -1, tokens.shape[-1])

    def forward(self, batch):
        """The sum of −log p over what is learned; `batch` as `to_torch` makes it."""
        frame_tokens = self.embed_frames(batch["frames"], batch["first"])
        index = batch["index"][..., None].expand(-1, -1, frame_tokens.shape[-1])
        embeds = self.llm.get_input_embeddings()(batch["tokens"])
        embeds = torch.where(batch["is_frame"][..., None], frame_tokens.gather(1, index).to(embeds.dtype), embeds)
        logits = self.llm(
            inputs_embeds=embeds, attention_mask=batch["mask"], position_ids=batch["positions"], use_cache=False
        ).logits
        return functional.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten(), reduction="sum")


def to_torch(batch: Mapping[str, np.ndarray], frame_tokens: int, device: str) -> dict[str, torch.Tensor]:
    """A batch of packed rows with all that depends on its layout worked out, mask included.

    Args:
        frame_tokens: of a row.
    """
    given = {name: torch.from_numpy(np.asarray(batch[name])) for name in batch}
    positions, segments, is_frame = given["positions"].long(), given["segments"].long(), given["is_frame"]
    seen = (segments[:, :, None] == segments[:, None, :]) & (positions[:, None, :] <= positions[:, :, None])
    made = {
        "frames": given["frames"],
        "first": given["first"],
        "is_frame": is_frame,
        "index": (is_frame.long().cumsum(1) - 1).clamp(0, frame_tokens - 1),
        "tokens": given["tokens"].long().masked_fill(is_frame, 0),
        "positions": positions.clamp(min=0),
        "mask": seen[:, None],  # padding, all of one segment and position, sees padding
        "labels": given["labels"].long().masked_fill(given["kinds"] <= 0, -100),
    }
    return {name: x.contiguous().to(device) for name, x in made.items()}


# ------------------------------------------------------------------------------------------------------- the weights


def names_of(config: ModelConfig, shapes: Mapping[str, np.ndarray]) -> dict[str, tuple[str, str, dict]]:
    """Which of our params each of the model's parameters is made of: its name → (our paths, pattern, sizes of axes), by
    the tables of published checkpoints and the stem's own."""
    vision, own = config.vision, {}
    assert isinstance(vision, SiglipConfig)
    stem = "vision/(stem_|patch_embedding|position_embedding)"
    rooms = {"siglip": ("vision/", "vision."), "llama": ("decoder/", "llm."), "": ("projector/mlp/", "")}
    for family, (room, prefix) in rooms.items():
        leaves = {path: x for path, x in shapes.items() if path.startswith(room)}
        if room == "vision/" and (vision.stem_width or vision.num_images > 1):
            leaves = {path: x for path, x in leaves.items() if not re.match(stem, path)}
        for tensor in plan_of(FAMILIES[family] if family else CONNECTOR, config, leaves).values():
            key = tensor.key.removeprefix("vision_model.") if room == "vision/" else tensor.key
            key = key.removeprefix("model.") if not family else key
            own[prefix + key] = (tensor.paths, tensor.pattern, dict(tensor.sizes))
    if vision.stem_width or vision.num_images > 1:
        cell, patch = STEM_CELL, vision.patch_size // (STEM_CELL if vision.stem_width else 1)
        kernels = {"stem_cells": cell, "patch_embedding": patch} if vision.stem_width else {"patch_embedding": patch}
        for name, size in kernels.items():
            own[f"vision.embeddings.{name}.weight"] = (
                (f"vision/{name}/kernel",), "out c p q -> (p q c) out", {"p": size, "q": size},
            )  # fmt: skip
            own[f"vision.embeddings.{name}.bias"] = ((f"vision/{name}/bias",), "", {})
        if vision.stem_width:
            own["vision.embeddings.stem_conv.weight"] = (("vision/stem_conv/kernel",), "out c p q -> p q c out", {})
            own["vision.embeddings.stem_conv.bias"] = (("vision/stem_conv/bias",), "", {})
        own["vision.embeddings.position_embedding"] = (("vision/position_embedding",), "", {})
    if vision.token_positions:
        own["token_positions"] = (("projector/token_positions",), "", {})
    return own


def torch_model(config: TrainConfig, params: Mapping[str, np.ndarray], trained: set[str], device: str) -> TorchVideoLM:
    """The model with these weights, ready to be trained.

    Args:
        params: path → array, adapters included.
        trained: paths; all else is frozen, in the compute dtype.
    """
    frozen_dtype = getattr(torch, config.compute_dtype)
    model = TorchVideoLM(config.model)
    names = names_of(config.model, {path: x for path, x in params.items() if not path.startswith(lora.PREFIX)})
    parameters = dict(model.named_parameters())
    unused = {"token_positions"} - set(names)
    assert set(parameters) - unused == set(names), set(parameters) ^ set(names)
    with torch.no_grad():
        for name, (paths, pattern, sizes) in names.items():
            value = to_theirs([np.asarray(params[path], np.float32) for path in paths], pattern, sizes)
            parameters[name].copy_(torch.from_numpy(np.array(value)))
            parameters[name].requires_grad_(paths[0] in trained)
            if paths[0] not in trained:
                parameters[name].data = parameters[name].data.to(frozen_dtype)
    if config.lora.rank:
        add_adapters(model, config.lora, names, params)
    if config.remat != "none":
        model.llm.gradient_checkpointing_enable({"use_reentrant": False})
        model.llm.enable_input_require_grads()
    return model.train().to(device)


def add_adapters(model: TorchVideoLM, config: LoraConfig, names: Mapping, params: Mapping[str, np.ndarray]) -> None:
    """Puts peft's adapters beside the decoder's kernels, with our values."""
    import peft  # type: ignore

    peft_config = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore  (a whole number by peft's annotation; it only divides it)
        lora_dropout=config.dropout,
        target_modules=list(config.modules),
    )
    model.llm = peft.get_peft_model(model.llm, peft_config)
    parameters = dict(model.llm.named_parameters())
    for name, (paths, _, _) in names.items():
        layer = lora.PREFIX + paths[0].removesuffix("/kernel")
        for side, theirs in (("a", "lora_A"), ("b", "lora_B")):
            if f"{layer}/{side}" in params:
                key = "base_model.model." + name.removeprefix("llm.").removesuffix(".weight")
                value = np.ascontiguousarray(np.asarray(params[f"{layer}/{side}"], np.float32).T)
                parameters[f"{key}.{theirs}.default.weight"].data.copy_(torch.from_numpy(value))
