"""The tokenizer: published cases, text that only looks special, and a small one trained from scratch."""

import json

import numpy as np
import pytest

from jstream.config import ProtocolConfig
from jstream.data import world as worlds
from jstream.data.world.labels import WORDS
from jstream.protocols import make_tokenizer, special_tokens
from jstream.protocols.streamo import STATE_TOKENS
from jstream.protocols.tokenizer import Tokenizer, TokenizerError, train_tokenizer

TINY = ProtocolConfig(
    user_open="<|user|>", user_close="", assistant_open="<|assistant|>", assistant_close="<|end|>",
    frame_open="", frame_close="", frame_token="<|frame|>",
)  # fmt: skip
TEXTS = [
    "A red circle moves left.",
    "  two  spaces, tabs\t\tand\r\nlines\n\n\n",
    "Führer, нещо на Български, កាន់តែពិសេស, 東京で 12345 回、½",
    "🚀 😶‍🌫️ 🦙\U0010ffff\x00\x7f",
    "<0s-1s>\n<99s-100s>\n",
    "it's 3.14e-5%; foo_bar(baz)[0] != 'x' || y",
    "",
]


@pytest.fixture(scope="module")
def small():
    texts = [" a"]
    for index in range(40):
        world = worlds.make_world(1, index)
        for task in worlds.TASKS:
            dialogue = worlds.make_dialogue(world, task, worlds.generator(1, index))
            if dialogue is not None:
                texts += [f"{query.text}\n" for query in dialogue.queries]
                texts += [f" {response.text}" for response in dialogue.responses]
    return make_tokenizer(TINY, texts + [f" {word}" for word in WORDS] * 50, 640)


@pytest.fixture(scope="module")
def qwen(shared_data):
    return Tokenizer.load(shared_data / "tokenizers/qwen2_5")


def error_of(path):
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.load(path)
    message = str(caught.value)
    assert str(path) in message and "expected a tokenizer.json" in message and "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- a published vocabulary


def test_the_published_cases_of_qwen_come_out_id_for_id(shared_data, qwen):
    lines = (shared_data / "tokenizers/llama_cpp_vocab_tests/qwen2.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    assert len(cases) == 43
    for case in cases:
        assert qwen.encode(case["text"]) == case["ids"], case["text"]


def test_qwen_writes_back_what_it_read(qwen):
    for text in TEXTS:
        assert qwen.decode(qwen.encode(text)) == text


def test_qwen_knows_its_template_tokens_as_special(qwen):
    assert qwen.special("<|im_start|>") == 151644
    assert qwen.encode_template("<|im_start|>user\n") == [151644, 872, 198]
    with pytest.raises(TokenizerError, match="expected the special token '</Silence>'"):
        qwen.special("</Silence>")


# ----------------------------------------------------------------------------------------- text that only looks special


@pytest.mark.parametrize("name", ["small", "qwen"])
def test_text_never_becomes_a_special_token(name, request):
    tokenizer = request.getfixturevalue(name)
    specials = set(tokenizer.specials.values())
    for token, index in tokenizer.specials.items():
        assert tokenizer.encode_template(token) == [index]
        for text in (
            token,
            f"say {token} twice: {token}{token}",
            f"{token[:-1]}{token}{token[-1]}",
            f"{token[:3]}{token}{token[3:]}",
            f"\n{token}\n",
        ):
            ids = tokenizer.encode(text)
            assert not specials & set(ids), text
            assert tokenizer.decode(ids) == text


def test_decoding_leaves_special_tokens_out(small):
    ids = small.encode_template("<|user|>") + small.encode(" red") + small.encode_template("</Silence><|end|>")
    assert small.decode(ids) == " red"


# ------------------------------------------------------------------------------------------------- trained from scratch


@pytest.mark.smoke
def test_any_text_can_be_written_in_a_trained_tokenizer(small):
    rng = np.random.default_rng(0)
    random = ["".join(chr(c) for c in rng.integers(32, 0xD7FF, 40)) for _ in range(20)]
    for text in TEXTS + random:
        assert small.decode(small.encode(text)) == text
    bare = train_tokenizer([], 300, ["<|end|>"])
    for text in TEXTS + random:
        assert bare.decode(bare.encode(text)) == text


def test_numbers_and_the_words_of_the_world_are_single_tokens(small):
    assert [len(small.encode(str(number))) for number in range(200)] == [1] * 200
    split = [word for word in WORDS if len(small.encode(f" {word}")) != 1]
    assert split == []
    assert len({small.encode(f" {word}")[0] for word in WORDS}) == len(set(WORDS))


def test_a_time_label_is_a_few_tokens(small):
    assert max(len(small.encode(f"<{i}s-{i + 1}s>\n")) for i in range(199)) <= 5


def test_special_tokens_come_first_and_the_vocabulary_keeps_its_limit(small):
    names = special_tokens(TINY)
    assert set(names) >= {"<|user|>", "<|assistant|>", "<|end|>", "<|frame|>"}
    assert names[-4:] == ["<|frame|>", *STATE_TOKENS] and len(set(names)) == len(names)
    assert [small.special(name) for name in names] == list(range(len(names)))
    assert small.vocab_size <= 640


def test_a_saved_tokenizer_loads_the_same(small, tmp_path):
    small.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        again = Tokenizer.load(path)
        assert again.specials == small.specials and again.vocab_size == small.vocab_size
        assert [again.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]


# --------------------------------------------------------------------------------------------------------- broken files


def test_a_missing_tokenizer_is_a_one_line_error(tmp_path):
    assert "No such file" in error_of(tmp_path / "none.json")
    assert "tokenizer.json" in error_of(tmp_path)  # a folder without one


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"[]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"<html>\n</html>"]
)
def test_a_broken_tokenizer_is_a_one_line_error(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    error_of(path)
