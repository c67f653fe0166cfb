"""A training step in torch, as plainly as one would write it: forward, backward, clip, AdamW (extra `parity`)."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch  # type: ignore

from jstream.benchmarks.torch_model import to_torch, torch_model
from jstream.config import TrainConfig
from jstream.training.optimizer import learning_rate


class Loss:
    """A loss that may still be in the making on the device; jax waits for it as for its own arrays."""

    def __init__(self, value: Any):
        self.value = value
        self._done = torch.cuda.Event() if value.is_cuda else None
        if self._done is not None:
            self._done.record()

    def block_until_ready(self) -> "Loss":
        if self._done is not None:
            self._done.synchronize()
        return self

    def __float__(self) -> float:
        return float(self.value)


class TorchStep:
    """The step of a config's only stage, on one batch.

    Args:
        params: path → array, to start from.
        trained: paths of those that are learned.
    """

    def __init__(
        self,
        config: TrainConfig,
        params: Mapping[str, np.ndarray],
        trained: set[str],
        batch: Mapping[str, np.ndarray],
    ):
        torch.set_num_threads(os.cpu_count() or 1)
        self.config, self.stage, self.steps = config, config.stages[0], 0
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        self.model = torch_model(config, params, trained, self.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        decays = [p for p in self.parameters if p.ndim >= 2]
        others = [p for p in self.parameters if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, config.beta2),
            eps=1e-8,
            fused=True,
        )
        frame_tokens = self.stage.frames * config.model.vision.tokens_per_frame
        self.learned = int(np.sum(batch["kinds"] > 0))
        count = self.stage.accumulate
        self.parts = [
            to_torch({name: x[part::count] for name, x in batch.items()}, frame_tokens, self.device)
            for part in range(count)
        ]

    def __call__(self) -> Loss:
        """Takes a step; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.steps)
        self.steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        half = self.config.compute_dtype == "bfloat16"
        total = torch.zeros((), device=self.device)
        for part in self.parts:
            with torch.autocast(self.device, torch.bfloat16) if half else contextlib.nullcontext():
                loss = self.model(part) / self.learned
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self.optimizer.step()
        return Loss(total)
