"""Batches without data: real renderings of made-up dialogues, under random token ids, over random frames.

A row is full of dialogues of one length, laid as any other row (`data.rows`); only the last of a row is cut. Speed
depends on the layout, not on what is said, so neither a tokenizer nor a video of the config's own is needed.
"""

from importlib import resources

import numpy as np

from jstream.config import ConfigError, StageConfig, TrainConfig
from jstream.data.rows import Sample, lay_row
from jstream.data.world.labels import WORDS
from jstream.protocols import make_protocol, special_tokens
from jstream.protocols.protocol import RESPONSE, Rendering, StreamProtocol, Turn
from jstream.protocols.tokenizer import Tokenizer

SHARES = (0.85, 0.05, 0.10)  # of the states among turns
REPLY, QUERY = (4, 24), (6, 12)  # fewest and most words
ASKED = 30  # turns from one question to the next


def bundled_protocol(config: TrainConfig) -> StreamProtocol:
    """A config's protocol in the words of the bundled tokenizer, for whoever has not that of the config's weights.

    Raises:
        ConfigError: the model has fewer tokens.
    """
    with resources.as_file(resources.files("jstream") / "assets" / "tiny" / "tokenizer.json") as path:
        tokenizer = Tokenizer.load(path).with_specials(special_tokens(config.protocol))
    if tokenizer.vocab_size > config.model.decoder.vocab_size:
        raise ConfigError(
            f"model.decoder.vocab_size: expected at least the {tokenizer.vocab_size} tokens of the made-up dialogues, "
            f"found {config.model.decoder.vocab_size}"
        )
    return make_protocol(config.protocol, tokenizer, config.model.vision.tokens_per_frame)


def synthetic_batch(
    config: TrainConfig, stage: StageConfig, turns: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], tuple[int, ...]]:
    """A batch of a stage, and the token ids of the states in it.

    Args:
        turns: of each dialogue.

    Raises:
        ConfigError: a row has no room for a turn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    protocol = bundled_protocol(config)
    ids = rng.permutation(config.model.decoder.vocab_size).astype(np.int32)  # what each token of the protocol becomes
    rows = [_row(config, stage, protocol, turns, ids, rng, index) for index in range(stage.rows)]
    if not all((row["decisions"] >= 0).any() for row in rows):
        raise ConfigError(f"stage: expected room for a turn in every row, found {stage.frames} frames, {stage.tokens}")
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return batch, tuple(int(ids[token]) for token in protocol.decision_ids)


def _row(
    config: TrainConfig,
    stage: StageConfig,
    protocol: StreamProtocol,
    turns: int,
    ids: np.ndarray,
    rng: np.random.Generator,
    index: int,
) -> dict[str, np.ndarray]:
    samples, frames, tokens = [], 0, 0
    while frames < stage.frames and (tokens < stage.tokens or not stage.tokens):
        rendering = _rendering(protocol, min(turns, stage.frames - frames), rng, bool(stage.tokens))
        frames, tokens = frames + len(rendering.ends), tokens + len(rendering.tokens)
        images = np.zeros((len(rendering.ends), *config.model.vision.frame_size, 3), np.uint8)
        samples.append(Sample(rendering, images))
    words = ids[: len(WORDS)] if stage.objective.needs_names else None
    row = lay_row(samples, stage, config.model.vision, words, index)
    row["frames"] = rng.integers(0, 256, row["frames"].shape, np.uint8)
    for name in ("words", "happenings"):
        if name in row:
            row[name] = (rng.random(row[name].shape) < 0.1).astype(np.uint8)
    known = len(ids) - 1  # a placeholder may lie past the vocabulary
    row["tokens"] = np.where(row["is_frame"], row["tokens"], ids[np.minimum(row["tokens"], known)])
    row["labels"] = ids[np.minimum(row["labels"], known)]
    return row


def _rendering(protocol: StreamProtocol, turns: int, rng: np.random.Generator, with_tokens: bool) -> Rendering:
    """A dialogue of so many turns; without tokens, its frames alone."""
    if not with_tokens:
        nothing, zeros = np.zeros(0, np.int32), np.zeros(turns, np.int32)
        return Rendering(nothing, nothing, nothing, nothing, decisions=zeros, ends=zeros)
    text = lambda bounds: " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(*bounds)))
    states = rng.choice(len(SHARES), turns, p=SHARES)
    return protocol.render(
        [
            Turn(
                float(i), i + 1.0, query=text(QUERY) if i % ASKED == 0 else None, state=int(state),
                reply=text(REPLY) if state == RESPONSE else None,
            )
            for i, state in enumerate(states)
        ]
    )  # fmt: skip
