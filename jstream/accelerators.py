"""Accelerators: what they can do, and how to compile for those that are not here.

libtpu and the CUDA plugin compile without a device, and count the bytes that a program takes as they would on one
(extra `aot`; CUDA's compiler comes with `pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt` of jax's version).
"""

import os
from typing import Any

from jax.experimental import topologies

GIB = 1 << 30

# Dense bfloat16 FLOP/s of one device by the start of its `device_kind`, from data sheets.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
}

# Bytes/s that one device reads from its memory, as above.
PEAK_BANDWIDTH = {
    "NVIDIA H200": 4.8e12,
    "NVIDIA H100": 3.35e12,
    "NVIDIA A100": 2.039e12,
    "NVIDIA GeForce RTX 3090": 0.936e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5": 2.765e12,  # v5p
    "TPU v6": 1.64e12,
}

# Bytes of a chip that a program can have, as the compiler says when there are too few; v5p and v4 by data sheet.
TPU_MEMORY = {"v4": 32 * GIB, "v5e": 15.75 * GIB, "v5p": 95 * GIB, "v6e": 31.24 * GIB}

# What the CUDA compiler has to know of a card (jaxlib's GpuTopology): the same for all, then each its own.
_CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {} shared_memory_per_core: {} shared_memory_per_block_optin: {} l2_cache_size: {}
  memory_bandwidth: {} device_memory_size: {} clock_rate_ghz: {} cuda_compute_capability {{ major: {} minor: {} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 20 }}
runtime_version {{ major: 13 }}
device_description_str: "{}"
"""
_CARDS = {
    "h200": (132, 233472, 232448, 62914560, 4800000000000, 150000000000, 1.98, 9, 0, "NVIDIA H200"),
    "a100": (108, 167936, 166912, 41943040, 2039000000000, 84929347584, 1.41, 8, 0, "NVIDIA A100-SXM4-80GB"),
    "rtx3090": (82, 102400, 101376, 6291456, 936000000000, 25300000000, 1.695, 8, 6, "NVIDIA GeForce RTX 3090"),
}
KNOWN = "a TPU slice such as v5p:2x2x1, v5e:2x4 or v6e:2x2, or a card: " + ", ".join(_CARDS)


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where it is not known."""
    return _known(PEAK_FLOPS, device_kind)


def peak_bandwidth(device_kind: str) -> float | None:
    """Bytes/s that a device reads from its memory; None where it is not known."""
    return _known(PEAK_BANDWIDTH, device_kind)


def _known(peaks: dict[str, float], device_kind: str) -> float | None:
    return next((peak for kind, peak in peaks.items() if device_kind.startswith(kind)), None)


def compile_without_devices() -> None:
    """Sets the environment so that compilers look for no device and hurry; to be called before jax does anything.

    At full effort a compile takes eight times as long and lays out 1 % fewer bytes (docs/memory.md).
    """
    for name, value in {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask a metadata server, and wait for a lock
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_HOST_BOUNDS": "1,1,1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # cuDNN and a driver are needed to run, not to compile
    }.items():
        os.environ.setdefault(name, value)
    # cuBLAS for products: without a card Triton's tile sizes cannot be tried out
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()


def abstract_devices(name: str) -> tuple[list[Any], float]:
    """Devices that need not be here.

    Args:
        name: see KNOWN.

    Returns:
        The devices, and the bytes that each has.

    Raises:
        ValueError: for another name.
    """
    if name in _CARDS:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=_CARD.format(*_CARDS[name]), topology="1x1x1"
        )
        return list(topology.devices), _CARDS[name][5]
    generation = name.partition(":")[0]
    if generation not in TPU_MEMORY or ":" not in name:
        raise ValueError(f"expected {KNOWN}; found {name!r}")
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices), TPU_MEMORY[generation]
