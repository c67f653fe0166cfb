"""Parity with the published implementations: what transformers and peft compute on the CPU is what we compute."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: every model is small and random
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest


@pytest.fixture(autouse=True)
def _one_thread_and_one_seed():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
