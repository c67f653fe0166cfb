"""What tells the params of one vision tower from those of another, however they are loaded and wherever they lie."""

import hashlib
import json
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

_PRIMES = (0x9E3779B1, 0x85EBCA77)  # xxHash's, as multipliers of places


def fingerprint(params: Mapping[str, jax.Array]) -> str:
    """A hash of params by their paths.

    Params count as they are in bfloat16, so that a tower opened in float32 is the same one. What is summed over are
    whole numbers, on the devices: any sharding gives the same.

    Args:
        params: path → array.
    """
    sums = {path: _sums(x) for path, x in params.items()}
    found = [[path, list(params[path].shape), *map(int, sums[path])] for path in sorted(sums)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


@jax.jit
def _sums(x: jax.Array) -> list[jax.Array]:
    """Two uint32: the bits of all values, each times a factor that its place gives."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    bits = jnp.where(bits & 0x7F80, bits, 0)  # some devices take what is below the normal numbers for zero
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis in range(x.ndim):
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    totals = []
    for prime in _PRIMES:
        factor = (place + 1) * jnp.uint32(prime)
        factor ^= factor >> 15
        totals.append(jnp.sum((bits + 1) * (factor | 1)))
    return totals
