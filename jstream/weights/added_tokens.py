"""Rows for tokens that a published vocabulary does not have, such as the states of a protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.weights.checkpoint import CheckpointError


def grow_embedding(params: dict[str, Any], new_rows: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Gives added tokens the mean of the plain tokens that spell their names, in the embedding and an untied head.

    Ids past the table make it grow; `vocab_size` of the config is then the table's new length.

    Args:
        params: of a model.
        new_rows: id of an added token → ids of plain tokens.

    Returns:
        New params; those given stay as they are.

    Raises:
        CheckpointError: no spelling, one with ids past the table, or new ids that leave a gap behind it.
    """
    decoder = dict(params["decoder"])
    rows = len(decoder["embed_tokens"]["embedding"])
    grown = max([rows - 1, *new_rows]) + 1
    spelled = all(len(pieces) and 0 <= min(pieces) and max(pieces) < rows for pieces in new_rows.values())
    if not spelled or min(new_rows, default=0) < 0 or not set(range(rows, grown)) <= set(new_rows):
        raise CheckpointError(
            f"new_rows: expected ids up to {rows - 1}, or from {rows} on without a gap, each spelled by ids below "
            f"{rows}; found {dict(new_rows)}"
        )

    def with_rows(table: jax.Array) -> jax.Array:
        means = [table[np.asarray(pieces)].astype(jnp.float32).mean(0) for pieces in new_rows.values()]
        table = jnp.pad(table, ((0, grown - rows), (0, 0)))
        return table.at[np.asarray(list(new_rows))].set(jnp.stack(means).astype(table.dtype))

    if new_rows:
        decoder["embed_tokens"] = {"embedding": with_rows(decoder["embed_tokens"]["embedding"])}
        if "lm_head" in decoder:
            decoder["lm_head"] = {"kernel": with_rows(decoder["lm_head"]["kernel"].T).T}
    return {**params, "decoder": decoder}
