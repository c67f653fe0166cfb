"""LIVE renders and labels random dialogues as the published format says: one text, and which characters are learned.

The reference here writes the whole text, tokenizes it at once and finds what is learned by where tokens begin in it, as
showlab/videollm-online does (`models/tokenization_live.py`); `protocols.live` joins the tokens of turns.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from jstream.protocols import make_tokenizer
from jstream.protocols.live import PUBLISHED, Live, turns_of_chat
from jstream.protocols.protocol import NOT_LEARNED, STATE
from jstream.protocols.tokenizer import Tokenizer

NUM_DIALOGUES = 60
BEGIN, END, FRAME = "<|begin_of_text|>", "<|eot_id|>", "<v>"
WORDS = "You take the cup pan 3 1024 kettle, slowly; \"left\" (again) it's café 東京 🚀 end-to-end don't".split(" ")
ENDS = [".", "", "?", "!", "...", '?"', " :)", "\n", ".\n\n", " ", "?!"]


def random_text(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(1, 8))) + str(rng.choice(ENDS))


def random_conversation(rng: np.random.Generator) -> list[dict]:
    """Frames learned, not learned, or learned up to one of them; behind them a question, a reply, both; in the end
    sometimes nothing."""
    messages: list[dict] = [{"role": "system", "content": random_text(rng)}]
    for _ in range(rng.integers(1, 9)):
        count = int(rng.integers(1, 7))
        learn = [True, False, int(rng.integers(0, count + 1))][rng.integers(3)]
        messages.append({"role": "stream", "num_frames": count, "learn": learn})
        asked, answered = [(True, True), (True, False), (False, True)][rng.integers(3)]
        if asked:
            messages.append({"role": "user", "content": random_text(rng)})
        if answered:
            reply = {"role": "assistant", "content": random_text(rng), "learn": bool(rng.random() < 0.7)}
            messages.append(reply)
    if rng.random() < 0.3:
        messages.append({"role": "stream", "num_frames": 2, "learn": True})
    return messages


def published(messages: Sequence[dict], tokenizer: Tokenizer, tokens_per_frame: int) -> tuple[list[int], list[int]]:
    """Token ids and labels: the id that a position predicts, or −100. The text is open for more frames at its end."""
    text, learned = "", []  # characters to be predicted: (begin, end)
    for message in messages:
        content = message.get("content", "")
        match message["role"]:
            case "system":
                text += BEGIN + content + "\n"
            case "user":
                text += "\nUser: " + content
            case "assistant":
                text += "\n"
                said = "Assistant: " + content + END
                if message["learn"]:
                    learned.append((len(text), len(text) + len(said)))
                text += said
            case "stream":
                text += "\n["
                num_frames, learn = message["num_frames"], message["learn"]
                for number in range(num_frames):
                    text += FRAME * tokens_per_frame
                    last = number == num_frames - 1
                    if number < (num_frames if learn is True else learn):
                        learned.append((len(text), len(text) + (2 if last else 1)))  # "]" and its newline are one
                    text += "]" if last else ","
    text += "\n["  # more frames are to come
    encoding = tokenizer._inner.encode(text, add_special_tokens=False)
    begins, labels = [begin for begin, _ in encoding.offsets], [-100] * len(encoding.ids)
    for begin, end in learned:
        targets = range(begins.index(begin), begins.index(end) if end in begins else len(begins))
        for target in targets:
            labels[target - 1] = encoding.ids[target]
    return encoding.ids, labels


def check_random_dialogues(tokenizer: Tokenizer, tokens_per_frame: int) -> None:
    """Compares `protocols.live` with the reference.

    Args:
        tokenizer: without the frame token.
    """
    tokenizer = tokenizer.with_specials([FRAME])
    learned = {"frames": 0, "words": 0, "nothing": 0}
    for seed in range(NUM_DIALOGUES):
        messages = random_conversation(np.random.default_rng(seed))
        config = dataclasses.replace(PUBLISHED, system=messages[0]["content"])
        rendering = Live(config, tokenizer, tokens_per_frame).render(turns_of_chat(messages))
        tokens, labels = published(messages, tokenizer, tokens_per_frame)
        if messages[-1]["role"] == "stream":  # a live stream goes on with a comma, not with another row of frames
            closed = len(tokens) - tokens[::-1].index(tokenizer.special(FRAME))
            tokens, labels = tokens[:closed], labels[: closed - 1]
        else:
            assert len(rendering.tokens) == len(tokens)
        found = np.where(rendering.kinds == NOT_LEARNED, -100, rendering.labels)
        assert rendering.tokens[: len(tokens)].tolist() == tokens, messages
        assert found[: len(labels)].tolist() == labels, messages
        kinds = rendering.kinds[: len(labels)]
        at_frames = rendering.is_frame[: len(labels)]
        np.testing.assert_array_equal(kinds == STATE, at_frames & (np.asarray(labels) != -100))
        learned["frames"] += int((kinds == STATE).sum())
        learned["words"] += int((kinds > 0).sum() - (kinds == STATE).sum())
        learned["nothing"] += int((kinds == NOT_LEARNED).sum())
    assert min(learned.values()) > 300, learned


def test_random_dialogues_have_the_published_tokens_and_labels():
    text = "]\nUser: What is that?\nAssistant: You take the cup slowly.\n["
    check_random_dialogues(make_tokenizer(PUBLISHED, [text] * 40, 400), 3)


def test_random_dialogues_have_them_over_a_published_vocabulary(shared_data):
    qwen = Tokenizer.load(shared_data / "tokenizers/qwen2_5").with_specials([BEGIN, END])
    check_random_dialogues(qwen, 10)


@pytest.mark.parametrize(("learn", "expected"), [(True, [",", ",", "]\n"]), (2, [",", ","]), (0, []), (False, [])])
def test_the_reference_learns_what_the_format_says(learn, expected):
    """A frame learns what is behind it, and a reply its own words: worked by hand."""
    tokenizer = make_tokenizer(PUBLISHED, ["]\nUser: What?\nAssistant: A cup."] * 40, 400)
    frames = {"role": "stream", "num_frames": 3, "learn": learn}
    messages = [{"role": "system", "content": "S"}, frames, {"role": "assistant", "content": "A cup.", "learn": True}]
    tokens, labels = published(messages, tokenizer, 1)
    spell = lambda ids: tokenizer._inner.decode(ids, skip_special_tokens=False)
    assert spell(tokens) == f"{BEGIN}S\n\n[{FRAME},{FRAME},{FRAME}]\nAssistant: A cup.{END}\n["
    frame_id = tokenizer.special(FRAME)
    assert [spell([b]) for a, b in zip(tokens, labels) if a == frame_id and b != -100] == expected
    assert spell([b for a, b in zip(tokens, labels) if a != frame_id and b != -100]) == f"Assistant: A cup.{END}"
