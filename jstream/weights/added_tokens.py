"""Tokens of a protocol that a vocabulary lacks: a base model can be opened as it was published and gets them then."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jstream.config import ModelConfig, ProtocolConfig
from jstream.protocols import PROTOCOLS
from jstream.protocols.tokenizer import Tokenizer


def complete(tokenizer: Tokenizer, config: ProtocolConfig) -> tuple[Tokenizer, dict[int, list[int]]]:
    """Adds the protocol's own special tokens where they are missing.

    Returns:
        The tokenizer, and for each new id the ids of the plain tokens that spell it (`grow` takes them).
    """
    missing = [token for token in PROTOCOLS[config.name].own_tokens if token not in tokenizer.specials]
    if not missing:
        return tokenizer, {}
    completed = tokenizer.with_specials(missing)
    return completed, {completed.special(token): tokenizer.encode(token) for token in missing}


def grow(config: ModelConfig, params: dict[str, Any], new_rows: Mapping[int, Sequence[int]]):
    """The config and the params with rows for new tokens (`grow_embedding`)."""
    params = grow_embedding(params, new_rows)
    rows = len(params["decoder"]["embed_tokens"]["embedding"])
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=rows)), params


def grow_embedding(params: dict[str, Any], new_rows: Mapping[int, Sequence[int]]) -> dict[str, Any]:
    """Gives added tokens the mean of the plain tokens that spell their names, in the embedding and an untied head.

    Ids past the table make it grow; `vocab_size` of the config is then the table's new length.

    Args:
        params: of a model.
        new_rows: id of an added token → ids of plain tokens.

    Returns:
        New params; those given stay as they are.

    Raises:
        ValueError: no spelling, one with ids past the table, or new ids that leave a gap behind it.
    """
    decoder = dict(params["decoder"])
    rows = len(decoder["embed_tokens"]["embedding"])
    grown = max([rows - 1, *new_rows]) + 1
    spelled = all(len(pieces) and 0 <= min(pieces) and max(pieces) < rows for pieces in new_rows.values())
    if not spelled or min(new_rows, default=0) < 0 or not set(range(rows, grown)) <= set(new_rows):
        raise ValueError(
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
