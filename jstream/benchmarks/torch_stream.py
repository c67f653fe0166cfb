"""Steps of a live stream in torch: as VideoLLM-online's demo takes them, and improved (extra `parity`)."""

import os
import warnings
from collections.abc import Mapping

import jax
import numpy as np
import torch  # type: ignore
import transformers  # type: ignore

from jstream.benchmarks.torch_model import torch_model
from jstream.config import TrainConfig

# transformers 5.2x know the cache under its old and its new name; the old one works in all that the extra allows
warnings.filterwarnings("ignore", message="`past_key_values` is deprecated")


class TorchStream:
    """A cache of so many tokens, and the step that reads a chunk behind them.

    Args:
        config: with a LoRA rank, adapters stay beside their kernels and the cache grows by concatenation, as published;
            without one, the cache is static and the forward compiled.
        params: path → array, adapters included.
        context: f32 [S, D]: embeddings of what the cache holds.
    """

    def __init__(self, config: TrainConfig, params: Mapping[str, np.ndarray], context: np.ndarray, slots: int):
        torch.set_num_threads(os.cpu_count() or 1)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.llm = torch_model(config, params, set(), self.device).eval().llm
        self.dtype = getattr(torch, config.compute_dtype)
        if config.lora.rank:
            self.cache, self.forward = transformers.DynamicCache(), self.llm
        else:
            self.cache = transformers.StaticCache(config=self.llm.config, max_cache_len=slots)
            self.forward = torch.compile(self.llm, dynamic=False)
        with torch.inference_mode():
            self.llm(inputs_embeds=self.to_device(context), past_key_values=self.cache, use_cache=True)

    def to_device(self, embeds: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(embeds))[None].to(self.device, self.dtype)

    def logits(self, embeds: torch.Tensor) -> torch.Tensor:
        """[V] behind a chunk of embeddings [1, T, D]; the cache is as before."""
        with torch.inference_mode():
            out = self.forward(inputs_embeds=embeds, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache.crop(-embeds.shape[1])
            return out.logits[0, -1].float()

    def decide(self, embeds: torch.Tensor, silence_id: int) -> tuple[float, int]:
        """p(silence) and the most probable token, on the host."""
        logits = self.logits(embeds)
        return float(logits.softmax(-1)[silence_id]), int(logits.argmax())
