"""The protocols by the name that a config gives them."""

import dataclasses
import re
from collections.abc import Sequence

from jstream.config import ProtocolConfig
from jstream.protocols.joyai import JoyAI
from jstream.protocols.live import Live
from jstream.protocols.protocol import StreamProtocol, Turn
from jstream.protocols.streamo import Streamo
from jstream.protocols.tokenizer import Tokenizer, train_tokenizer

PROTOCOLS: dict[str, type[Streamo] | type[Live]] = {protocol.name: protocol for protocol in (Streamo, JoyAI, Live)}


def make_protocol(config: ProtocolConfig, tokenizer: Tokenizer, tokens_per_frame: int) -> StreamProtocol:
    """The protocol that a config names.

    Raises:
        TokenizerError: where the vocabulary lacks a special token of the protocol or of its chat template.
    """
    for token in special_tokens(config):
        tokenizer.special(token)
    return PROTOCOLS[config.name](config, tokenizer, tokens_per_frame)


def special_tokens(config: ProtocolConfig) -> list[str]:
    """Every special token of the protocol and its chat template, for a tokenizer that is trained with them."""
    template = "".join(
        getattr(config, f.name) for f in dataclasses.fields(config) if f.name.endswith(("_open", "_close"))
    )
    found = re.findall(r"<\|[^|]+\|>", template)
    return [*dict.fromkeys([*found, config.frame_token, *PROTOCOLS[config.name].own_tokens])]


def make_tokenizer(config: ProtocolConfig, texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Trains a small tokenizer on texts and on the labels of a few minutes of turns."""
    protocol = PROTOCOLS[config.name]
    label = (protocol if issubclass(protocol, Streamo) else Streamo).label  # LIVE has none, but speaks of times
    labels = [f"{label(Turn(i, i + 1))}\n" for i in range(200)] * 20
    return train_tokenizer([config.system, *labels, *texts], vocab_size, special_tokens(config))
