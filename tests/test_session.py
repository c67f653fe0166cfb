"""A live stream against the same conversation read at once."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jstream.config import DecoderConfig, ModelConfig, ProtocolConfig, QwenVisionConfig, SiglipConfig
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models.cache import EMPTY, CacheFullError
from jstream.models.rope import rope_positions
from jstream.models.video_lm import VideoLM, init_params, stack_frames
from jstream.protocols import make_protocol, make_tokenizer
from jstream.protocols.protocol import RESPONSE, STANDBY, Turn
from jstream.protocols.streamo import Streamo
from jstream.streaming import step as steps
from jstream.streaming.batch import Batch
from jstream.streaming.session import Session
from jstream.streaming.stream import Chunk

TINY_TEMPLATE = ProtocolConfig(
    user_open="<|user|>", user_close="", assistant_open="<|assistant|>", assistant_close="<|end|>",
    frame_open="", frame_close="", frame_token="<|frame|>",
)  # fmt: skip


@functools.cache
def make_model(mrope_section=(), temporal=1, pooled=False, template=TINY_TEMPLATE, seed=0) -> Model:
    vision = SiglipConfig(
        image_size=24, patch_size=12, stem_width=4, temporal_patch_size=temporal, width=16, num_layers=1, num_heads=2,
        mlp_dim=16, grid=2, pooled_token=pooled,
    )  # fmt: skip
    tokenizer = make_tokenizer(template, ["The red circle jumps. What is it? Narrate what happens."] * 30, 600)
    decoder = DecoderConfig(
        vocab_size=tokenizer.vocab_size, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=48,
        rope_theta=1e4, tie_embeddings=True, mrope_section=mrope_section,
    )  # fmt: skip
    config = ModelConfig(vision, decoder)
    params = jax.tree.map(
        lambda x: 3 * x, jax.jit(init_params, static_argnums=0)(config, jax.random.key(seed))
    )  # sharper than a fresh model
    return Model(config, params, make_protocol(template, tokenizer, vision.tokens_per_frame))


def frames(count: int, seed: int = 0) -> list[Frame]:
    rng = np.random.default_rng(seed)
    return [Frame(float(i), rng.integers(0, 256, (24, 24, 3), np.uint8)) for i in range(count)]


class Watcher(Session):
    """A session that can be told what to decide, and remembers what was done for it.

    Attributes:
        fed: every token.
        calls: the kind of every program that ran.
        replies: the tokens of the reply in each turn.
    """

    def __init__(self, *args, script=None, **kwargs):
        self.fed, self.calls, self.replies = [], [], []
        self._script = None if script is None else iter(script)
        super().__init__(*args, **kwargs)

    def _begin(self):
        super()._begin()
        self._speak, self.stream._reply = self.stream._reply, self._reply
        if self._script is not None:
            self.stream.protocol = copy.copy(self.stream.protocol)
            self.stream.protocol.decide = lambda *_, **__: next(self._script)

    def _do(self, wish):
        if isinstance(wish, Chunk):
            self.fed += wish.tokens
            self.calls.append("text" if wish.sight is None else "turn" if self.batch.lengths.frames else "frame")
        else:
            self.calls.append(type(wish).__name__.lower())
        return super()._do(wish)

    def _reply(self, opening):
        self.replies[-1] = yield from self._speak(opening)
        return self.replies[-1]

    def see(self, frame):
        self.replies.append([])
        return super().see(frame)

    def watch(self, seen, asked=None):
        for index, frame in enumerate(seen):
            if index in (asked or {}):
                self.ask(asked[index])
            yield self.see(frame)


SCRIPT = [0, RESPONSE, 0, STANDBY, STANDBY, RESPONSE, RESPONSE, 0]


@pytest.mark.smoke
@pytest.mark.parametrize("mrope_section", [(), (1, 1, 2)], ids=["rotary", "multimodal"])
@pytest.mark.parametrize(
    "temporal, pooled", [(1, False), (2, False), (1, True)], ids=["one-frame", "two-frame", "pooled"]
)
def test_streaming_equals_one_full_forward(mrope_section, temporal, pooled):
    model = make_model(mrope_section, temporal, pooled)
    watched = Watcher(model, capacity=512, max_new_tokens=5, script=SCRIPT)
    seen, probs = frames(len(SCRIPT)), []
    watched.ask("Narrate what happens.")
    for index, frame in enumerate(seen):
        if index == 3:
            watched.ask("What is it?")
        probs.append([*watched.see(frame).probs.values()])

    tokens = np.asarray(watched.fed, np.int32)
    is_frame = tokens == model.protocol.frame_id
    rope, _ = rope_positions(is_frame, model.config.vision.token_grid, bool(mrope_section))
    images = jnp.asarray(np.stack([frame.image for frame in seen]))[None]
    clips = stack_frames(images, jnp.arange(len(seen))[None] == 0, temporal)

    @jax.jit
    def whole(params):
        run = lambda *args, method: VideoLM(model.config).apply({"params": params}, *args, method=method)
        frame_tokens = run(clips[0], method="embed_frames").reshape(1, -1, model.config.decoder.width)
        embeds = run(tokens[None], is_frame[None], frame_tokens, method="embed_tokens")
        hidden, _ = run(embeds, jnp.arange(len(tokens))[None], jnp.asarray(rope)[:, None], method="hidden")
        return run(hidden, method="logits")[0]

    logits = whole(model.params)
    decided = np.flatnonzero(tokens == model.protocol.tokenizer.special("<|assistant|>"))
    want = jax.nn.softmax(logits[decided][:, jnp.asarray(model.protocol.state_ids)])
    assert len(decided) == len(SCRIPT)
    np.testing.assert_allclose(np.asarray(probs), want, atol=3e-5)  # so sharp a model magnifies the rounding of f32
    allowed = np.setdiff1d(np.arange(logits.shape[-1]), model.protocol.unspoken_ids)
    greedy = allowed[np.asarray(jnp.argmax(logits[:, allowed], axis=-1))]
    checked = 0
    for at in decided[np.asarray(SCRIPT) == RESPONSE]:  # greedy replies are what the whole forward predicts
        at += 1  # the state token
        while tokens[at + 1] != model.protocol.end_id:
            assert tokens[at + 1] == greedy[at]
            at, checked = at + 1, checked + 1
    assert checked >= 3


@pytest.mark.parametrize("memory", ["append", "sinks:4", "reprefill:4"])
def test_an_int8_cache_is_smaller_and_decides_nearly_the_same(memory):
    def watch(int8_cache):
        watched = Watcher(make_model(), memory, capacity=512, script=[0] * 16, int8_cache=int8_cache)
        probs = [[*watched.see(frame).probs.values()] for frame in frames(16)]
        return np.asarray(probs), sum(x.nbytes for x in jax.tree.leaves(watched.batch.cache))

    (exact, whole), (near, small) = watch(False), watch(True)
    assert small < 0.5 * whole  # of heads as narrow as these; of a published model it is nearer to a fourth of f32
    # so sharp a model magnifies all rounding, and single frames by chance a good deal
    assert 0 < np.abs(near - exact).mean() < 0.03 < 0.1 < np.abs(exact - exact.mean(0)).mean()


def test_what_a_session_feeds_is_the_rendering_of_the_dialogue_it_held():
    model = make_model()
    protocol = model.protocol
    watched = Watcher(model, capacity=1024, max_new_tokens=5, script=SCRIPT)
    turns = []
    for index, frame in enumerate(frames(len(SCRIPT))):
        query = {0: "Narrate what happens.", 4: "Say </Response> or <|end|>: ünïcode?"}.get(index)
        if query:
            watched.ask(query)
        event = watched.see(frame)
        turns.append((Turn(frame.time, frame.time + 1, query), SCRIPT[index], event))
    live = watched.fed + watched.stream._pending
    rendered = list(protocol.prefix)
    at = 0
    for turn, state, _ in turns:
        opened = protocol.open_turn(turn)
        rendered += opened
        reply = []
        if state == RESPONSE:  # the reply's own tokens, read from the stream: text may be tokenised another way
            at = len(rendered) + 1
            while live[at] != protocol.end_id:
                reply.append(live[at])
                at += 1
        rendered += protocol.close_turn(state, reply)
    assert live == rendered
    assert live.count(protocol.state_ids[RESPONSE]) == SCRIPT.count(RESPONSE)


def test_a_silent_turn_is_exactly_one_forward():
    watched = Watcher(make_model(), capacity=512, script=[0, STANDBY, 0])
    list(watched.watch(frames(3)))
    assert watched.calls == ["frame"] * 3


def test_nothing_is_compiled_or_traced_after_the_first_frame():
    traces = []
    step = steps.step_text

    def counted(*args):
        traces.append(1)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps, "step_text", counted)
        patch.setitem(steps.KINDS, "text", counted)
        watched = Watcher(make_model(), capacity=3000, max_new_tokens=3, script=SCRIPT * 3)  # no other test's shape
        before, compiled = len(traces), steps.compile_step.cache_info().misses
        watched.ask("Narrate what happens, at length: " + "what is it? " * 20)
        for frame in frames(len(SCRIPT) * 3):
            watched.see(frame)
        watched.reset()
        assert len(traces) == before == len(watched.batch.programs) == 4
        assert steps.compile_step.cache_info().misses == compiled


def test_the_state_is_donated():
    watched = Session(make_model(), capacity=512)
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(watched.batch.cache))
    for kind, program in watched.batch.programs.items():
        assert program.memory_analysis().alias_size_in_bytes >= cache_bytes, kind
    before = watched.batch.cache
    watched.see(frames(1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


def test_a_full_cache_is_an_error_not_an_overwrite():
    watched = Watcher(make_model(), capacity=128, script=[0] * 100)
    for count, frame in enumerate(frames(100)):  # noqa: B007
        try:
            watched.see(frame)
        except CacheFullError as error:
            assert "128" in str(error) and "\n" not in str(error)
            break
    assert 2 <= count <= 12

    def held():
        used = watched.stream.places.position
        assert used == len(watched.fed) <= 128
        positions = np.asarray(watched.batch.cache.positions[0])
        np.testing.assert_array_equal(positions[:used], np.arange(used))
        assert (positions[used:] == EMPTY).all()
        return jax.tree.map(np.asarray, watched.batch.cache)

    before = held()
    with pytest.raises(CacheFullError):  # and again: the stream stays as it was
        watched.see(frame)
    jax.tree.map(np.testing.assert_array_equal, before, held())


def test_a_long_question_goes_ahead_in_pieces_and_changes_nothing_else():
    model = make_model()
    question = "What is it? " * 40
    whole = Watcher(model, capacity=2048, script=[0, 0])
    lengths = whole.batch.lengths
    assert len(model.protocol.open_turn(Turn(0, 1, question.strip()))) > 2 * lengths.longest
    whole.ask(question)
    first = whole.see(frames(1)[0])
    wide = Watcher(model, capacity=2048, script=[0, 0])
    wide.batch = Batch(model, dataclasses.replace(lengths, turns=(lengths.turns[0], 1024)))  # the same in one piece
    wide._begin()
    wide.ask(question)
    np.testing.assert_allclose([*first.probs.values()], [*wide.see(frames(1)[0]).probs.values()], atol=1e-5)
    assert whole.fed == wide.fed


def test_events_say_what_was_decided():
    model = make_model()
    watched = Watcher(model, capacity=512, max_new_tokens=4, script=[0, RESPONSE])
    silent, spoken = [watched.see(frame) for frame in frames(2)]
    assert (silent.state, silent.text, silent.start) == ("silence", None, None)
    assert spoken.state == "response" and spoken.text is not None
    for event in (silent, spoken):
        assert set(event.probs) == {"silence", "standby", "response"}
        assert sum(event.probs.values()) == pytest.approx(1, abs=1e-5)
        assert event.latency > 0


def test_the_threshold_may_be_changed_while_a_stream_runs():
    watched = Session(make_model(), capacity=512, threshold=1.0, max_new_tokens=2)
    seen = frames(3)
    assert watched.see(seen[0]).state != "response"
    watched.threshold = 0.0
    assert watched.see(seen[1]).state == "response"
    watched.reset()  # it stays
    assert watched.see(seen[2]).state == "response"


def test_sampled_replies_repeat_with_their_seed():
    def texts(seed):
        watched = Watcher(
            make_model(), capacity=512, max_new_tokens=8, temperature=2.0, seed=seed, script=[RESPONSE] * 3
        )
        return [watched.see(frame).text for frame in frames(3)]

    assert texts(1) == texts(1) != texts(2)


def test_reset_forgets_the_stream():
    watched = Session(make_model(temporal=2), capacity=512)
    first = [watched.see(frame) for frame in frames(3)]
    watched.reset()
    again = [watched.see(frame) for frame in frames(3)]
    assert [dataclasses.replace(e, latency=0) for e in first] == [dataclasses.replace(e, latency=0) for e in again]


@pytest.mark.parametrize("text", ["", "  ", "x" * 2001])
def test_a_question_must_have_a_sensible_length(text):
    with pytest.raises(ValueError, match="1 to 2000 characters"):
        Session(make_model(), capacity=128).ask(text)


def test_an_unknown_memory_policy_is_refused():
    with pytest.raises(ValueError, match="append"):
        Session(make_model(), memory="forever")


def test_a_tower_that_keeps_the_aspect_takes_its_geometry_from_the_first_frame():
    plain = make_model(mrope_section=(1, 1, 2), template=ProtocolConfig())
    vision = QwenVisionConfig(
        frame_height=28, frame_width=28, width=16, num_layers=2, num_heads=2, mlp_dim=16, out_width=32, window_size=56,
        full_attention_layers=(1,), max_pixels=28 * 28 * 6,
    )  # fmt: skip
    config = ModelConfig(vision, plain.config.decoder)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    model = Model(config, params, Streamo(ProtocolConfig(), plain.protocol.tokenizer, vision.tokens_per_frame))
    rng = np.random.default_rng(0)
    wide = [Frame(float(i), rng.integers(0, 256, (40, 100, 3), np.uint8)) for i in range(3)]
    session, fitted = Watcher(model, capacity=512), Watcher(model.for_frames(40, 100), capacity=512)
    session.ask("What is it?")
    fitted.ask("What is it?")
    for frame in wide:
        assert session.see(frame).probs == fitted.see(frame).probs
    assert session.model.config.vision.token_grid == (1, 4)
    assert session.fed == fitted.fed and session.fed.count(model.protocol.frame_id) == 12
    other = session.see(Frame(3.0, wide[0].image.swapaxes(0, 1)))  # stretched to the first frame's geometry
    assert sum(other.probs.values()) == pytest.approx(1)
