"""LIVE over the vocabulary that its weights were trained with: published cases and labels, id for id.

Llama 3's vocabulary comes with Meta's package `llama-models`, as byte strings in order of rank.
"""

import base64
import dataclasses
import importlib.util
import json
import pathlib

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from jstream.protocols.live import PUBLISHED, Live, turns_of_chat
from jstream.protocols.protocol import NOT_LEARNED
from jstream.protocols.tokenizer import Tokenizer
from tests.test_live_rendering import check_random_dialogues, published

# Meta's `llama_models/llama3/tokenizer.py`: how text is cut into words; the special tokens in order
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 6: "<|start_header_id|>", 9: "<|eot_id|>"}


@pytest.fixture(scope="module")
def llama() -> Tokenizer:
    package = importlib.util.find_spec("llama_models")
    assert package is not None and package.submodule_search_locations
    path = pathlib.Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    ranks = {base64.b64decode(word): int(rank) for word, rank in map(str.split, path.read_text().splitlines())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    letters = dict(zip(printable, map(chr, printable)))
    letters |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in letters)}
    spell = lambda word: "".join(letters[byte] for byte in word)
    merges = []
    for word in sorted(ranks, key=ranks.__getitem__):
        halves = [(word[:i], word[i:]) for i in range(1, len(word)) if word[:i] in ranks and word[i:] in ranks]
        merges += sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocabulary = {spell(word): rank for word, rank in ranks.items()}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [(spell(a), spell(b)) for a, b in merges], ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    specials = [SPECIALS.get(i, f"<|reserved_special_token_{i}|>") for i in range(256)]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return Tokenizer(inner)


def test_the_published_cases_come_out_id_for_id(shared_data, llama):
    lines = (shared_data / "tokenizers/llama_cpp_vocab_tests/llama_bpe.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 44
    for case in map(json.loads, lines):
        assert llama.encode(case["text"]) == case["ids"], case["text"]


def test_conversations_have_the_published_tokens_and_labels(shared_data, llama):
    """Against VideoLLM-online's own tokenization of the same conversations."""
    lines = (shared_data / "golden/live_labels.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 6
    for case in map(json.loads, lines):
        system, *_ = case["conversation"]
        config = dataclasses.replace(PUBLISHED, system=system["content"])
        live = Live(config, llama.with_specials([config.frame_token]), case["config"]["frame_num_tokens"])
        assert live.frame_id == case["config"]["v_placeholder_id"]
        assert live.silence_id == case["config"]["frame_token_interval_id"]
        assert live.end_id == case["config"]["eos_token_id"]
        rendering = live.render(turns_of_chat(case["conversation"]))
        length = len(case["input_ids"])  # behind it the row of frames of a live stream is open again
        np.testing.assert_array_equal(rendering.tokens[:length], case["input_ids"])
        found = np.where(rendering.kinds == NOT_LEARNED, -100, rendering.labels)
        np.testing.assert_array_equal(found[:length], case["labels"])
        assert (found[length:] == -100).all() and len(found) - length <= 2
        # and so has the reference of random dialogues
        of_text = published(case["conversation"], live.tokenizer, live.tokens_per_frame)
        assert [x[:length] for x in of_text] == [case["input_ids"], case["labels"]]


def test_random_dialogues_have_the_published_tokens_and_labels(llama):
    check_random_dialogues(llama, 10)
