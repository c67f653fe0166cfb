"""Opening a model wherever it lies: ours, a published folder with or without the state tokens, and what is neither."""

import dataclasses

import jax
import numpy as np
import pytest
from published_configs import published
from safetensors import numpy as safetensors
from test_hf import ADAPTER, LLAMA, QWEN2_5, SIGLIP, decoder_shapes, live_parts, qwen_shapes, random_tensors, write
from test_live import TEXTS as LIVE_TEXTS

import jstream
from jstream.config import ProtocolConfig
from jstream.data.video import Frame
from jstream.models.video_lm import abstract_params
from jstream.protocols import live, make_tokenizer, special_tokens, streamo
from jstream.protocols.streamo import STATE_TOKENS
from jstream.protocols.tokenizer import Tokenizer, train_tokenizer
from jstream.weights.added_tokens import complete
from jstream.weights.published import load_of_config

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


def test_qwen_s_own_vocabulary_gets_the_state_tokens_behind_its_last(shared_data):
    qwen = Tokenizer.load(shared_data / "tokenizers/qwen2_5")
    missing = [token for token in CHAT_TOKENS if token not in qwen.specials]  # that copy is of the text model
    qwen = qwen.with_specials(missing)
    completed, new_rows = complete(qwen, streamo.PUBLISHED)
    last = qwen.vocab_size
    assert [completed.special(token) for token in STATE_TOKENS] == [last, last + 1, last + 2] == [*new_rows]
    assert [qwen.decode(pieces) for pieces in new_rows.values()] == [*STATE_TOKENS]
    assert all(max(pieces) < last for pieces in new_rows.values())
    # the embedding as published has 151,936 rows: the new ones are among those that no token had
    assert last + 2 < published("streamo", "3b").model.decoder.vocab_size


def test_what_cannot_be_opened_is_one_line(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, CHAT_TOKENS[:-1])
    publish(tmp_path, tokenizer, tokenizer.vocab_size)
    with pytest.raises(Exception, match="expected the special token '<|image_pad|>'".replace("|", r"\|")) as error:
        jstream.load(tmp_path)
    assert isinstance(error.value, jstream.CheckpointError) and "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(jstream.CheckpointError, match=r"tokenizer\.json"):
        jstream.load(tmp_path)


# ----------------------------------------------------------------------------------------------------- VideoLLM-online


@pytest.fixture
def adapter(tmp_path):
    """An adapter's folder beside its two base models; the vocabulary is Llama's, without the frame token."""
    words = [token for token in special_tokens(live.PUBLISHED) if token != live.PUBLISHED.frame_token]
    tokenizer = train_tokenizer(LIVE_TEXTS, 300, [*words, "<|begin_of_text|>", "<|eot_id|>"])
    rows = tokenizer.vocab_size
    llama = LLAMA | {"vocab_size": rows}
    names = {"llm": llama, "vision": SIGLIP, "adapter": ADAPTER}
    parts = live_parts()
    parts[0] = random_tensors(decoder_shapes(llama) | {"lm_head.weight": (rows, 16)}, np.float32)
    head = "base_model.model.lm_head.lora_B.weight"
    parts[2] |= random_tensors({head: (rows, 3)}, np.float32)
    for (name, config), tensors in zip(names.items(), parts, strict=True):
        write(tmp_path / name, config, tensors, "adapter_model" if name == "adapter" else "model")
    tokenizer.save(tmp_path / "llm" / "tokenizer.json")
    return tmp_path


def test_an_adapter_opens_with_its_base_models_and_streams(adapter):
    model = jstream.load(adapter / "adapter", llm=str(adapter / "llm"), vision=str(adapter / "vision"))
    assert isinstance(model.protocol, live.Live)
    assert model.protocol.frame_id == model.config.decoder.vocab_size  # behind the last row, which no one reads
    session = jstream.Session(model, capacity=1024, fps=2.0, max_new_tokens=4)
    session.ask("What is that?")
    rng = np.random.default_rng(0)
    events = [session.see(Frame(i / 2, rng.integers(0, 256, (60, 90, 3), np.uint8))) for i in range(3)]
    assert events[0].text is not None  # a question is answered at once
    assert all(set(event.probs) == {"silence", "response"} for event in events)


def test_an_adapter_without_its_base_model_is_one_line(adapter):
    with pytest.raises(jstream.CheckpointError, match="meta-llama/Meta-Llama-3-8B-Instruct") as error:
        jstream.load(adapter / "adapter", vision=str(adapter / "vision"))
    assert "\n" not in str(error.value)
    with pytest.raises(jstream.CheckpointError, match="expected a siglip model, found llama"):
        jstream.load(adapter / "adapter", llm=str(adapter / "llm"), vision=str(adapter / "llm"))


def test_the_published_configs_say_what_is_opened(adapter, tmp_path):
    config = published("videollm_online")
    assert config.weights.checkpoint == "chenjoya/videollm-online-8b-v1plus"
    weights = dataclasses.replace(config.weights, llm=str(adapter / "llm"), vision=str(adapter / "vision"))
    model = load_of_config(dataclasses.replace(config, weights=weights), str(adapter / "adapter"))
    assert model.protocol.config == live.PUBLISHED

    tokenizer = train_tokenizer(TEXTS, 300, CHAT_TOKENS)
    publish(tmp_path / "qwen", tokenizer, tokenizer.vocab_size)
    config = published("streamo", "7b")
    vision = dataclasses.replace(config.model.vision, max_pixels=20_000)
    model = load_of_config(
        dataclasses.replace(config, model=dataclasses.replace(config.model, vision=vision)), str(tmp_path / "qwen")
    )
    assert model.config.vision.max_pixels == 20_000
    assert load_of_config(None).config == jstream.load().config  # the bundled model


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("streamo", "3b", 3_754_622_976),
        ("streamo", "7b", 8_292_166_656),
        ("streamo", "4b", 4_437_815_808),
        ("joyai", None, 8_767_123_696),
        ("videollm_online", None, 8_030_261_248 + 316_283_904 + 20_979_712),  # Llama 3, SigLIP's tower, the connector
    ],
)
def test_the_published_sizes_have_the_published_number_of_params(name, size, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(published(name, size).model))) == count
