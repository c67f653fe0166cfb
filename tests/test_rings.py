"""A stream without an end in a cache of one size: what is left out is not seen, what is kept is as it was.

The reference is one forward over everything that was ever fed, under the mask that the policy claims; for `sinks` its
queries are turned back for the first tokens, as if these stood right before the window.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_memory import ASKED, NUM_FRAMES, all_frame_tokens, model_of, pictures, script_of
from test_session import Watcher

from jstream.config import ConfigError
from jstream.models import attention, rope
from jstream.models.cache import CacheFullError
from jstream.models.video_lm import run
from jstream.protocols.protocol import RESPONSE, SILENCE, Turn
from jstream.streaming import memory as mem
from jstream.streaming.stream import Chunk, Rebase


class Ring(Watcher):
    """A session that remembers where its turns begin, and what each token was told to see."""

    def __init__(self, *args, **kwargs):
        self.begins, self.oldest, self.decided, self.rebased = [], [], [], 0
        super().__init__(*args, **kwargs)

    def see(self, frame):
        self.begins.append(len(self.fed))
        return super().see(frame)

    def _do(self, wish):
        done = super()._do(wish)
        if isinstance(wish, Chunk):
            self.oldest += [wish.oldest] * len(wish.tokens)
            if wish.sight is not None:
                self.decided.append(len(self.fed) - 1)
        self.rebased += isinstance(wish, Rebase)
        return done


def claimed(watched, turns):
    """For every token the first one that it sees behind the sinks, by the policy: that of the oldest turn kept."""
    ends = [*watched.begins[1:], len(watched.fed)]
    oldest = []
    for index, (begin, end) in enumerate(zip(watched.begins, ends)):
        first = watched.begins[max(0, index + 1 - turns)]
        oldest += [first if first > watched.batch.lengths.sinks else 0] * (end - begin)
    return np.asarray(oldest)


def probabilities(watched, seen, oldest, monkeypatch):
    """At every decision, from one forward over all that was fed."""
    model, sinks = watched.model, watched.batch.lengths.sinks
    tokens = np.asarray(watched.fed, np.int32)
    is_frame = tokens == model.protocol.frame_id
    decoder = model.config.decoder
    multimodal = bool(decoder.mrope_section)
    positions, _ = rope.rope_positions(is_frame, model.config.vision.token_grid, multimodal)
    gap = np.where(oldest > 0, positions[0][oldest] - sinks, 0)
    back = np.broadcast_to(-gap, (3, 1, len(tokens)))
    angles = rope.rotary_angles(
        jnp.asarray(back), decoder.head_dim, decoder.rope_theta, decoder.mrope_section, decoder.mrope_interleaved
    )
    at = np.arange(len(tokens))
    mask = (at[None] <= at[:, None]) & ((at[None] >= oldest[:, None]) | (at[None] < sinks))

    def banded(q, k, v, *_):
        groups = q.shape[2] // k.shape[2]
        heads = lambda x: jnp.repeat(x, groups, axis=2)
        score = lambda q: jnp.einsum("btnh,bsnh->bnts", q, heads(k)) / np.sqrt(q.shape[-1])
        scores = jnp.where(at < sinks, score(rope.rotate(q, angles)), score(q))
        probs = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", probs, heads(v))

    monkeypatch.setattr(attention, "attend_packed", banded)
    frame_tokens = all_frame_tokens(model, seen)
    frame_tokens = frame_tokens.reshape(1, -1, frame_tokens.shape[-1])

    @jax.jit
    def logits(params):
        embeds = run(model.config, params, tokens[None], is_frame[None], frame_tokens, method="embed_tokens")
        hidden, _ = run(model.config, params, embeds, at[None], positions[:, None], method="hidden")
        return run(model.config, params, hidden[0, np.asarray(watched.decided)], method="logits")

    scores = jax.vmap(model.protocol.scores)(logits(model.params))
    return [list(model.protocol.probs(row.tolist()).values()) for row in np.asarray(scores)]


@pytest.mark.parametrize(("name", "memory"), [("siglip", "sinks:4")])  # tests/runs/test_streams.py has others
def test_every_decision_sees_the_turns_that_are_kept_and_no_others(name, memory, monkeypatch):
    model, script = model_of(name), script_of(NUM_FRAMES)
    if name == "live":
        script = [RESPONSE if index in ASKED or state == RESPONSE else SILENCE for index, state in enumerate(script)]
    watched = Ring(model, memory, max_new_tokens=5, script=script)
    seen = pictures(model)
    got = [list(event.probs.values()) for event in watched.watch(seen, ASKED)]
    oldest = claimed(watched, 4)
    assert len(set(oldest)) > 20  # as many times a turn has gone
    assert watched.oldest == oldest.tolist()
    want = probabilities(watched, seen, oldest, monkeypatch)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert np.ptp(want, axis=0).max() > 1e-3
    wider = probabilities(watched, seen, np.zeros_like(oldest), monkeypatch)
    assert np.abs(np.asarray(got) - wider).max() > 1e-3  # so what has gone would be seen


def test_the_cache_stays_as_it_is_and_a_silent_turn_is_one_forward():
    watched = Ring(model_of("siglip"), "sinks:4", max_new_tokens=5, script=[SILENCE] * 240)
    size = watched.batch.cache.slots
    assert size < 240 * len(watched.model.protocol.open_turn(Turn(0, 1)))
    list(watched.watch(pictures(watched.model, 240)))
    assert watched.calls == ["frame"] * 240 and watched.batch.cache.slots == size
    sinks, held = watched.batch.lengths.sinks, np.asarray(watched.batch.cache.positions[0])
    seen = held[(held >= watched.stream.places.oldest) | ((held >= 0) & (held < sinks))]
    assert set(seen) == {*range(sinks), *range(watched.begins[-4], len(watched.fed))}


def test_a_question_is_said_again_when_its_turn_goes():
    watched = Ring(model_of("siglip"), "sinks:4", max_new_tokens=5, script=[SILENCE] * 12)
    list(watched.watch(pictures(watched.model, 12), {1: "What is it?"}))
    ends = [*watched.begins[1:], len(watched.fed)]
    asked = watched.model.protocol.tokenizer.encode("What is it?\n")[:3]
    texts = [watched.fed[begin:end] for begin, end in zip(watched.begins, ends)]
    said = [index for index, text in enumerate(texts) if any(text[i : i + 3] == asked for i in range(len(text)))]
    assert said == [1, 5, 9]


def test_turns_that_say_too_much_go_early(monkeypatch):
    model, script = model_of("siglip"), [RESPONSE] * (NUM_FRAMES + 3)
    with pytest.raises(ConfigError) as error:
        Ring(model, "sinks:6", capacity=100, max_new_tokens=30)
    least = int(str(error.value).split("capacity of ")[1].split()[0])
    watched = Ring(model, "sinks:6", capacity=least + 24, max_new_tokens=30, script=script)
    seen = pictures(model)
    got = [list(event.probs.values()) for event in watched.watch(seen, ASKED)]
    oldest = np.asarray(watched.oldest)
    assert (oldest >= claimed(watched, 6)).all() and (oldest > claimed(watched, 6)).any()
    assert set(oldest) <= {0, *watched.begins}  # whole turns
    np.testing.assert_allclose(got, probabilities(watched, seen, oldest, monkeypatch), atol=2e-5)
    watched.reset()  # the longest question that may be asked has its place as well
    question, room = "é?", watched.batch.lengths.room
    while watched.stream.tokens_in(f"{question}!") <= room:
        question += "!"
    with pytest.raises(ValueError, match=f"at most {room} tokens"):
        watched.ask(f"{question}!!!!")
    assert len(list(watched.watch(seen[:3], {1: question}))) == 3


def test_a_turn_that_is_longer_than_the_ring_is_an_error():
    places = mem.Places(100, 20, mem.Memory(3, ring=True, sinks=True), 4)
    places.open_turn()
    places.take(20)
    places.take(16)
    with pytest.raises(CacheFullError, match="a turn that takes 21 more does not fit"):
        places.take(21)


@pytest.mark.parametrize("name", ["siglip", "qwen"])
def test_turning_keys_back_changes_no_decision(name, monkeypatch):
    model, script = model_of(name), script_of(40)
    run_of = lambda: Ring(model, "sinks:4", max_new_tokens=5, script=script)
    facts = lambda watched: [(e.state, e.text, *e.probs.values()) for e in watched.watch(pictures(model, 40), ASKED)]
    plain, turned = run_of(), run_of()
    want = facts(plain)
    monkeypatch.setattr(mem, "REBASE_AT", 50)
    got = facts(turned)
    assert plain.rebased == 0 and turned.rebased > 3
    assert turned.stream.places.rope < 300 < plain.stream.places.rope
    assert [row[:2] for row in got] == [row[:2] for row in want]
    np.testing.assert_allclose([row[2:] for row in got], [row[2:] for row in want], atol=2e-5)


def test_a_ring_starts_anew_when_it_is_reset():
    watched = Ring(model_of("siglip"), "sinks:4", max_new_tokens=5)
    facts = lambda: [dataclasses.replace(e, latency=0) for e in watched.watch(pictures(watched.model, 9), ASKED)]
    first = facts()
    watched.reset()
    assert facts() == first
