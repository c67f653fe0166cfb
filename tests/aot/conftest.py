"""Compiling for accelerators that are not here (extra `aot`): libtpu and the CUDA plugin compile without a device."""

import os

# before libtpu is loaded: it would ask a metadata server, and wait for a lock
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_HOST_BOUNDS", "1,1,1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# cuBLAS for products: without a card Triton's tile sizes cannot be tried out
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_triton_gemm=false".strip()
