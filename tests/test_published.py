"""Opening a model wherever it lies: ours, a published folder with or without the state tokens, and what is neither."""

import jax
import numpy as np
import pytest
from safetensors import numpy as safetensors
from test_hf import QWEN2_5, qwen_shapes, random_tensors, write

import jstream
from jstream.config import ProtocolConfig
from jstream.data.video import Frame
from jstream.protocols import make_tokenizer
from jstream.protocols.streamo import STATE_TOKENS
from jstream.protocols.tokenizer import train_tokenizer

CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
TEXTS = ["system user assistant What happens?\n <0s-1s>\n A cup is put down."] * 20


def publish(folder, tokenizer, rows):
    """A small Qwen2.5-VL folder as published, with so many rows in its embedding."""
    config = QWEN2_5 | {"vocab_size": rows}
    write(folder, config, random_tensors(qwen_shapes(config)))
    tokenizer.save(folder / "tokenizer.json")
    return safetensors.load_file(folder / "model.safetensors")


@pytest.mark.parametrize("spare", [0, 7])
def test_a_base_model_gets_the_state_tokens(tmp_path, spare):
    tokenizer = train_tokenizer(TEXTS, 300, CHAT_TOKENS)
    rows = tokenizer.vocab_size + spare
    tensors = publish(tmp_path, tokenizer, rows)
    model = jstream.load(tmp_path)
    grown = max(rows, tokenizer.vocab_size + 3)
    embedding = np.asarray(model.params["decoder"]["embed_tokens"]["embedding"])
    assert model.config.decoder.vocab_size == len(embedding) == grown
    assert model.protocol.decision_ids == tuple(range(tokenizer.vocab_size, tokenizer.vocab_size + 3))
    table = tensors["model.embed_tokens.weight"].astype(np.float32)
    for token, index in zip(STATE_TOKENS, model.protocol.decision_ids, strict=True):
        np.testing.assert_allclose(embedding[index], table[tokenizer.encode(token)].mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(embedding[: tokenizer.vocab_size], table[: tokenizer.vocab_size])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"float32"}

    session = jstream.Session(model, capacity=1024)
    session.ask("What happens?")
    rng = np.random.default_rng(0)
    for second in range(2):
        event = session.see(Frame(float(second), rng.integers(0, 256, (60, 90, 3), np.uint8)))
        assert sum(event.probs.values()) == pytest.approx(1)


def test_a_model_that_has_the_state_tokens_stays_as_it_is(tmp_path):
    tokenizer = make_tokenizer(ProtocolConfig(), TEXTS, 300)
    tensors = publish(tmp_path, tokenizer, tokenizer.vocab_size)
    model = jstream.load(tmp_path)
    assert model.protocol.decision_ids == tuple(tokenizer.special(token) for token in STATE_TOKENS)
    embedding = np.asarray(model.params["decoder"]["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(embedding, tensors["model.embed_tokens.weight"].astype(np.float32))
    assert model.protocol.config.system.startswith("\nYou are a helpful assistant")


def test_what_cannot_be_opened_is_one_line(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, CHAT_TOKENS[:-1])
    publish(tmp_path, tokenizer, tokenizer.vocab_size)
    with pytest.raises(Exception, match="expected the special token '<|image_pad|>'".replace("|", r"\|")) as error:
        jstream.load(tmp_path)
    assert isinstance(error.value, jstream.CheckpointError) and "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(jstream.CheckpointError, match=r"tokenizer\.json"):
        jstream.load(tmp_path)
