"""What a session remembers of a long stream: at every frame its decision is that of a fresh prompt of what is kept."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_live import PUBLISHED as LIVE_CONFIG
from test_live import TEXTS as LIVE_TEXTS
from test_session import Watcher, frames, make_model

from jstream.config import ConfigError, ModelConfig, ProtocolConfig, QwenVisionConfig
from jstream.model import Model
from jstream.models.cache import EMPTY
from jstream.models.rope import rope_positions
from jstream.models.video_lm import init_params, run, stack_frames
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.live import Live
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY, Turn
from jstream.protocols.streamo import Streamo
from jstream.streaming.memory import EXPECTED, KeptTurn, Memory, parse_memory, read_again, standing
from jstream.streaming.session import Session

NUM_FRAMES = 28
ASKED = {2: "Narrate what happens.", 13: "What is it?"}


def script_of(count: int) -> list[int]:
    return np.random.default_rng(1).choice([SILENCE, STANDBY, RESPONSE], count, p=[0.5, 0.2, 0.3]).tolist()


@functools.cache
def model_of(name: str) -> Model:
    """`siglip` sees the frame before as well; `qwen` has multimodal rotary positions and keeps the aspect."""
    milder = lambda params: jax.tree.map(lambda x: x / 2, params)  # very sharp models magnify the rounding of f32
    if name == "siglip":
        model = make_model(temporal=2, pooled=True)
        return dataclasses.replace(model, params=milder(model.params))
    if name == "live":
        model = make_model()
        protocol = make_protocol(LIVE_CONFIG, make_tokenizer(LIVE_CONFIG, LIVE_TEXTS, 420), 4)
        return dataclasses.replace(model, params=milder(model.params), protocol=protocol)
    plain = make_model(mrope_section=(1, 1, 2), template=ProtocolConfig())
    vision = QwenVisionConfig(
        frame_height=28, frame_width=28, width=16, num_layers=2, num_heads=2, mlp_dim=16, out_width=32, window_size=56,
        full_attention_layers=(1,), max_pixels=28 * 28 * 6,
    ).for_frames(24, 48)  # fmt: skip
    config = ModelConfig(vision, plain.config.decoder)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)))
    return Model(config, milder(params), Streamo(ProtocolConfig(), plain.protocol.tokenizer, vision.tokens_per_frame))


def pictures(model: Model, count: int = NUM_FRAMES):
    size = model.config.vision.frame_size
    rng = np.random.default_rng(0)
    return [dataclasses.replace(f, image=rng.integers(0, 256, (*size, 3), np.uint8)) for f in frames(count)]


# ----------------------------------------------------------------------------------------- the reference, written anew


def prompt_of(protocol, first, now, words, asked, script, replies, since=None) -> list[int]:
    """Frames `first` to `now` as a text of their own, up to the decision at `now`; read anew last at `since`."""
    tokens = list(protocol.prefix)
    again = "\n".join(asked[at] for at in sorted(asked) if at <= (now if since is None else since)) or None
    for index in range(first, now + 1):
        query = asked.get(index) if words else None
        if index == first and (first > 0 or not words):
            query = again
        turn = Turn(float(index), index + 1.0, query)
        tokens += protocol.open_turn(turn)
        if index == now:
            break
        state, reply = (script[index], replies[index]) if words else (SILENCE, [])
        if isinstance(protocol, Streamo):
            tokens += protocol.close_turn(state, reply)
        elif state == RESPONSE:
            tokens += [*protocol.open_reply(turn), *reply, *protocol.close]
        elif query:
            tokens += protocol.tokenizer.encode(f"]\nUser: {query}\n[")
        else:
            tokens += [protocol.silence_id]
    return tokens


def all_frame_tokens(model: Model, seen) -> jax.Array:
    images = jnp.asarray(np.stack([frame.image for frame in seen]))[None]
    clips = stack_frames(images, jnp.arange(len(seen))[None] == 0, model.config.vision.num_images)[0]
    return jax.jit(lambda params, x: run(model.config, params, x, method="embed_frames"))(model.params, clips)


@functools.cache
def full_forward(config):
    def logits(params, tokens, is_frame, frame_tokens, positions, rope, last):
        embeds = run(config, params, tokens, is_frame, frame_tokens, method="embed_tokens")
        hidden, _ = run(config, params, embeds, positions, rope, method="hidden")
        return run(config, params, hidden[0, last], method="logits")

    return jax.jit(logits)


def scores_of(model: Model, tokens: list[int], frame_tokens: jax.Array, length: int = 1024) -> list[float]:
    """The probabilities behind a text, from one forward over all of it without a cache (padded to one length)."""
    padded = np.zeros((1, length), np.int32)
    padded[0, : len(tokens)] = tokens
    positions = np.where(np.arange(length) < len(tokens), np.arange(length), -1)[None]
    is_frame = padded == model.protocol.frame_id
    rope, _ = rope_positions(is_frame, model.config.vision.token_grid, bool(model.config.decoder.mrope_section))
    room = np.zeros((1, 16 * model.protocol.tokens_per_frame, frame_tokens.shape[-1]), np.float32)
    room[0, : is_frame.sum()] = np.asarray(frame_tokens).reshape(-1, frame_tokens.shape[-1])
    last = len(tokens) - 1
    logits = full_forward(model.config)(model.params, padded, is_frame, room, positions, rope, last)
    return list(model.protocol.probs(np.asarray(model.protocol.scores(logits)).tolist()).values())


# ----------------------------------------------------------------------------------------------------------- the claims


@pytest.mark.parametrize(
    ("name", "memory"),
    [  # tests/runs/test_streams.py has others
        ("siglip", "reprefill:5"),
        ("siglip", "last_frames:4"),
        ("siglip", "hop:7:2"),
    ],
)
def test_every_decision_is_that_of_a_fresh_prompt_of_what_is_kept(name, memory):
    model, script, policy = model_of(name), script_of(NUM_FRAMES), parse_memory(memory)
    if name == "live":
        script = [RESPONSE if index in ASKED or state == RESPONSE else SILENCE for index, state in enumerate(script)]
    seen = pictures(model)
    watched = Watcher(model, memory, max_new_tokens=5, script=script)
    got = [list(event.probs.values()) for event in watched.watch(seen, ASKED)]
    assert sum(map(bool, watched.replies)) >= 5 and NUM_FRAMES - policy.turns >= 20  # of them dropped
    tokens, want = all_frame_tokens(model, seen), []
    first, since = 0, 0
    for now in range(NUM_FRAMES):
        if now - first == policy.turns:
            first, since = first + policy.drops, now
        if not policy.words:
            since = now
        prompt = prompt_of(model.protocol, first, now, policy.words, ASKED, script, watched.replies, since)
        want.append(scores_of(model, prompt, tokens[first : now + 1]))
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.ptp(want, axis=0).max() > 1e-3  # and they differ from frame to frame


@pytest.mark.parametrize("name", ["siglip", "qwen"])
def test_a_window_is_append_bit_for_bit_until_it_is_full(name):
    model = model_of(name)
    seen, script = pictures(model, 10), script_of(10)
    assert RESPONSE in script[:7]
    settings = dict(capacity=1024, max_new_tokens=5, script=script)
    facts = lambda event: dataclasses.replace(event, latency=0)
    plain = list(map(facts, Watcher(model, **settings).watch(seen, ASKED)))
    window = list(map(facts, Watcher(model, "reprefill:8", **settings).watch(seen, ASKED)))
    assert window[:8] == plain[:8]
    assert window[8].probs != plain[8].probs


def test_a_full_window_costs_its_turns_and_one_vision_tower():
    watched = Watcher(model_of("siglip"), "reprefill:3", script=[SILENCE] * 5)
    embed, costs = watched.batch.embed, []
    watched.batch.embed = lambda sights: (watched.calls.append("look"), embed(sights))
    for _ in watched.watch(pictures(watched.model, 5), asked={}):
        costs.append([kind for kind in watched.calls if kind != "text"])  # a long system prompt goes ahead once
        watched.calls.clear()
    assert costs == [["look", "turn"]] * 3 + [["look", "turn", "turn", "turn"]] * 2


@pytest.mark.parametrize("memory", ["reprefill:4", "last_frames:3"])
def test_nothing_is_compiled_after_the_first_frame_and_nothing_piles_up(memory):
    compiled, listening = [], [True]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if listening[0] and "backend_compile" in event else None
    )
    script = script_of(24)
    watched = Watcher(model_of("siglip"), memory, capacity=1111, max_new_tokens=3, script=script)
    jax.jit(lambda x: x + 1)(0)
    assert compiled  # so the listener hears
    compiled.clear()
    asked = {0: "Narrate what happens, at length: " + "what is it? " * 20, 9: "What is it?"}
    arrays = []
    for _ in watched.watch(pictures(watched.model, 24), asked):
        arrays.append(len(jax.live_arrays()))
        assert len(watched.stream._kept) <= watched.memory.turns
    watched.reset()
    listening[0] = False
    assert not compiled
    assert max(arrays[6:]) == max(arrays[12:])
    assert watched.stream._kept == [] and watched.stream._heard == []


def test_the_cache_is_rewound_in_place():
    watched = Watcher(model_of("siglip"), "last_frames:3", script=[SILENCE] * 5)
    seen = pictures(watched.model, 5)
    list(watched.watch(seen[:4], ASKED))
    before = watched.batch.cache
    where = [x.unsafe_buffer_pointer() for x in before.keys + before.values]
    watched.see(seen[4])
    cache, used = watched.batch.cache, watched.stream.places.position
    assert [x.unsafe_buffer_pointer() for x in cache.keys + cache.values] == where
    assert all(x.is_deleted() for x in before.keys)
    positions = np.asarray(cache.positions[0])
    np.testing.assert_array_equal(positions[:used], np.arange(used))
    assert (positions[used:] == EMPTY).all()


def test_turns_that_say_too_much_go_early_and_the_cache_never_fills():
    model, script = model_of("siglip"), [RESPONSE] * NUM_FRAMES
    with pytest.raises(ConfigError) as error:
        Session(model, "reprefill:6", capacity=100, max_new_tokens=30)
    least = int(str(error.value).split("capacity of ")[1].split()[0])
    watched = Watcher(model, "reprefill:6", capacity=least, max_new_tokens=30, script=script)
    seen = pictures(model)
    tokens, kept = all_frame_tokens(model, seen), []
    for now, event in enumerate(watched.watch(seen, ASKED)):
        assert watched.stream.places.position <= least
        kept.append(len(watched.stream._kept))
        first = now + 1 - kept[-1]
        prompt = prompt_of(model.protocol, first, now, True, ASKED, script, watched.replies)
        want = scores_of(model, prompt, tokens[first : now + 1])
        np.testing.assert_allclose(list(event.probs.values()), want, atol=1e-5)
    assert min(kept[6:]) < 6
    ended = watched.model.protocol.end_id
    assert all(len(reply) == 30 or ended not in reply for reply in watched.replies)


def test_a_question_that_fits_into_no_window_is_refused():
    watched = Watcher(model_of("siglip"), "last_frames:2", capacity=384, script=[SILENCE] * 3)
    seen = pictures(watched.model, 3)
    list(watched.watch(seen[:2], asked={}))
    with pytest.raises(ValueError, match="a question: expected at most"):
        watched.ask("é?" * 500)
    longest = "é?" * 40
    assert 100 < watched.stream.tokens_in(longest) <= watched.stream.lengths.room
    for _ in range(3):  # together they do not fit: the oldest are forgotten
        longest += "!"
        watched.ask(longest)
    assert watched.see(seen[2]).state == "silence"
    assert 1 <= len(watched.stream._heard) < 3 and watched.stream._heard[-1] == longest


def spell(protocol, chunks) -> str:
    return protocol.tokenizer._inner.decode([t for chunk in chunks for t in chunk], skip_special_tokens=False)


PAST = [
    KeptTurn(Turn(7, 8, state=SILENCE), (), 0),
    KeptTurn(Turn(8, 9, "What is it?", state=STANDBY), (), 0),
    KeptTurn(Turn(9, 10, state=RESPONSE), (1, 2), 0),
]


@pytest.mark.parametrize(
    "memory, chunks",
    [
        (
            Memory(3),  # as in maifoundations/Streamo, `inference.py`, with a reply of two tokens
            "<|user|>Narrate.\nWhat is it?\n<8s-9s>\nF<|assistant|></Standby><|end|><|user|><9s-10s>\nF<|assistant|>"
            "</Response>{reply}<|end|><|user|>When?\n<10s-11s>\nF<|assistant|>",
        ),
        (
            Memory(3, words=False),
            "<|user|>Narrate.\nWhat is it?\n<8s-9s>\nF<|assistant|></Silence><|end|><|user|><9s-10s>\nF<|assistant|>"
            "</Silence><|end|><|user|><10s-11s>\nF<|assistant|>",
        ),
    ],
)
def test_what_is_read_again_in_streamo(memory, chunks):
    protocol = make_model().protocol
    past = (
        PAST if memory.words else [dataclasses.replace(k, turn=Turn(k.turn.start, k.turn.end), reply=()) for k in PAST]
    )
    left, found, shown = read_again(memory, protocol, past, Turn(10, 11, "When?"), ["Narrate.", "What is it?"], 999)
    reply = protocol.tokenizer._inner.decode([1, 2], skip_special_tokens=False)
    expected = chunks.replace("{reply}", reply).replace("F", "<|frame|>" * protocol.tokens_per_frame)
    assert spell(protocol, found) == expected
    assert left == past[1:] and shown == Turn(10, 11, "When?" if memory.words else None)


def test_what_is_read_again_in_live():
    protocol = model_of("live").protocol
    assert isinstance(protocol, Live)
    past = [PAST[0], dataclasses.replace(PAST[2], reply=tuple(protocol.encode_reply("A cup, red.")))]
    _, found, _ = read_again(Memory(5), protocol, past, Turn(10, 11), ["What is that?"], 999)
    frame = "<v>" * 4
    assert spell(protocol, found) == (
        f"{frame}]\nUser: What is that?\n[{frame}]\nAssistant: A cup, red.<|eot_id|>\n[{frame}"
    )


def test_questions_stand_each_once_and_the_oldest_are_forgotten():
    assert standing(["Narrate.", "What?", "When?", "What?"], len, 100) == ["Narrate.", "When?", "What?"]
    many = [f"Question {index:04d}: what is it that happens now?" for index in range(500)]
    kept = standing(many, len, 2000)
    assert kept == many[-len(kept) :] and 1940 < sum(map(len, kept)) <= 2000
    assert standing(["Narrate.", "x" * 99], len, 100) == ["x" * 99]


def test_policies_have_the_windows_of_their_publications():
    assert parse_memory("append") == Memory(None)
    assert parse_memory("reprefill") == Memory(300) and parse_memory("reprefill:120") == Memory(120)
    assert parse_memory("hop:8") == Memory(8, drops=4) and parse_memory("hop:300:20") == Memory(300, drops=20)
    assert parse_memory("sinks:9") == Memory(9, ring=True, sinks=True) and parse_memory("window") == Memory(
        120, ring=True
    )
    with pytest.raises(ConfigError, match="at most 4 turns to be dropped at once, found 5"):
        parse_memory("hop:4:5")
    assert parse_memory("last_frames") == parse_memory("last_frames:4") == Memory(4, words=False)


@pytest.mark.parametrize(
    "text", ["", "forever", "append:3", "reprefill:0", "reprefill:-1", "reprefill:", "reprefill:1.5", "Reprefill",
             "last_frames:four", "last_frames: 4", "reprefill:4\n", "reprefill:١", "sinks:4:2", "hop:4:", "hop:4:0"],
)  # fmt: skip
def test_an_unknown_policy_is_one_line(text):
    with pytest.raises(ConfigError, match=rf"^memory: expected {re.escape(EXPECTED)}, found"):
        parse_memory(text)
