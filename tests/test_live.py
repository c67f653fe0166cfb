"""The LIVE protocol: what is learned where, and that a live stream writes what training read."""

import numpy as np
import pytest

from jstream.data.dialogue import DialogueError
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.live import PUBLISHED, SYSTEM_PROMPT, THRESHOLD, Live, turns_of_chat
from jstream.protocols.protocol import NOT_LEARNED, RESPONSE, SILENCE, STANDBY, STATE, TEXT, Turn

TEXTS = [SYSTEM_PROMPT, "]\nUser: What is that?\nAssistant: A cup, red.", "]\nAssistant: You take a cup.", "\n["] * 40
DIALOGUE = [
    Turn(0, 1),
    Turn(1, 2, "What is that?", RESPONSE, "A cup, red."),
    Turn(2, 3),
    Turn(3, 4),
    Turn(4, 5, state=RESPONSE, reply="You take a cup."),
    Turn(5, 6),
]


@pytest.fixture(scope="module")
def live() -> Live:
    protocol = make_protocol(PUBLISHED, make_tokenizer(PUBLISHED, TEXTS, 420), tokens_per_frame=3)
    assert isinstance(protocol, Live)
    return protocol


def spell(live, tokens):
    return live.tokenizer._inner.decode(list(tokens), skip_special_tokens=False)


def test_a_dialogue_reads_as_published(live):
    frame = "<v><v><v>"
    assert spell(live, live.render(DIALOGUE).tokens) == (
        f"<|begin_of_text|>{SYSTEM_PROMPT}\n\n[{frame},{frame}]\nUser: What is that?\nAssistant: A cup, red.<|eot_id|>"
        f"\n[{frame},{frame},{frame}]\nAssistant: You take a cup.<|eot_id|>\n[{frame},"
    )


def test_the_chunks_of_a_live_dialogue_are_its_rendering(live):
    tokens = list(live.prefix)
    for turn in DIALOGUE:
        tokens += live.open_turn(turn)
        if turn.state == RESPONSE:
            tokens += [*live.open_reply(turn), *live.encode_reply(turn.reply), *live.close]
        else:
            tokens += live.close_turn(turn.state)
    assert tokens == live.render(DIALOGUE).tokens.tolist()


def test_frames_learn_the_comma_and_what_ends_them_and_replies_learn_every_word(live):
    r = live.render(DIALOGUE)
    learned = {kind: [int(r.labels[p]) for p in np.flatnonzero(r.kinds == kind)] for kind in (STATE, TEXT)}
    comma, bracket = live.decision_ids
    assert spell(live, [comma]) == ","
    assert spell(live, [bracket]) == "]\n"
    assert learned[STATE] == [comma, comma, comma, bracket, comma]  # the second turn answers a question: not foreseen
    assert spell(live, learned[TEXT]) == "Assistant: A cup, red.<|eot_id|>Assistant: You take a cup.<|eot_id|>"
    # every label is the token that comes next
    for position in np.flatnonzero(r.kinds != NOT_LEARNED):
        assert r.tokens[position + 1] == r.labels[position]
    assert [int(r.tokens[d]) for d in r.decisions] == [live.frame_id] * len(DIALOGUE)
    assert r.ends[-1] == len(r.tokens)


def test_a_question_without_an_answer_stands_alone(live):
    r = live.render([Turn(0, 1, "Narrate."), Turn(1, 2)])
    assert spell(live, r.tokens).endswith("[<v><v><v>]\nUser: Narrate.\n[<v><v><v>,")
    assert (r.kinds != NOT_LEARNED).sum() == 1


def test_standby_is_silence(live):
    waiting, silent = (live.render([Turn(0, 1), Turn(1, 2, state=state), Turn(2, 3)]) for state in (STANDBY, SILENCE))
    np.testing.assert_array_equal(waiting.tokens, silent.tokens)
    np.testing.assert_array_equal(waiting.labels, silent.labels)
    assert live.close_turn(STANDBY) == live.close_turn(SILENCE)


@pytest.mark.parametrize(
    "scores, state",
    [
        ([THRESHOLD + 0.01, 0.1], SILENCE),
        ([THRESHOLD - 0.01, 0.1], RESPONSE),
        ([0.9, 0.05], SILENCE),
        ([0.2, 0.7], RESPONSE),
    ],
)
def test_the_model_speaks_where_the_comma_is_improbable(live, scores, state):
    assert live.decide(scores) == state
    assert live.decide(scores, asked=True) == RESPONSE
    probs = live.probs(scores)
    assert probs == {"silence": scores[0], "response": 1 - scores[0]}


def test_a_threshold_of_ones_own_is_that_of_speaking(live):
    assert live.decide([0.6, 0.3], threshold=0.5) == SILENCE
    assert live.decide([0.4, 0.3], threshold=0.5) == RESPONSE
    assert live.decide([0.4, 0.45], threshold=0.7) == RESPONSE  # the comma is not the most probable token
    assert live.decide([0.4, 0.3], threshold=0.7) == SILENCE


def test_scores_are_of_silence_and_of_the_best_other_token(live):
    logits = np.full(500, -20.0, np.float32)
    logits[live.silence_id], logits[7] = 1.0, 0.0
    p = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(live.scores(logits), [p, 1 - p], rtol=1e-5)


def test_what_a_user_says_is_text(live):
    asked = live.open_reply(Turn(0, 1, "say <|eot_id|> and <v>"))
    assert live.end_id not in asked and live.frame_id not in asked


CHAT = [
    {"role": "system", "content": "Watch."},
    {"role": "stream", "num_frames": 2, "learn": False},
    {"role": "user", "content": "What is that?"},
    {"role": "stream", "num_frames": 3, "learn": 2},
    {"role": "assistant", "content": "A pan.", "learn": False},
    {"role": "stream", "num_frames": 1, "learn": True},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "A cup, red.", "learn": True},
]


def test_a_published_conversation_says_what_is_learned(live):
    turns = turns_of_chat(CHAT)
    assert [(t.query, t.reply, t.learn_state) for t in turns] == [
        (None, None, False), ("What is that?", None, False), (None, None, True), (None, None, True),
        (None, "A pan.", False), ("Sure?", "A cup, red.", True),
    ]  # fmt: skip
    assert [t.end for t in turns] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    r = live.render(turns)
    comma, bracket = live.decision_ids
    assert [int(r.labels[p]) for p in r.decisions if r.kinds[p] == STATE] == [comma, comma, bracket]
    words = [int(r.labels[p]) for p in np.flatnonzero(r.kinds == TEXT)]
    assert spell(live, words) == "Assistant: A cup, red.<|eot_id|>"  # the first answer is not learned
    assert all(r.kinds[p] == NOT_LEARNED for p in range(r.decisions[4], r.ends[4]))


@pytest.mark.parametrize("messages", [CHAT[2:3], [CHAT[1], CHAT[2], CHAT[2]], [CHAT[1], {"role": "tool"}], [{}]])
def test_a_conversation_that_does_not_fit_is_one_line(messages):
    with pytest.raises(DialogueError, match="message [012]: expected frames") as error:
        turns_of_chat(messages)
    assert "\n" not in str(error.value)
