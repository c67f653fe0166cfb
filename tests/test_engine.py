"""Many streams in one batch: each is what it would be alone, whoever comes and goes beside it."""

import copy
import dataclasses
import threading

import jax
import numpy as np
import pytest
from test_memory import model_of, pictures
from test_session import frames, make_model

from jstream.config import ConfigError
from jstream.models.cache import CacheFullError
from jstream.protocols.protocol import RESPONSE, SILENCE
from jstream.streaming import side_by_side
from jstream.streaming import step as steps
from jstream.streaming.engine import Engine, EngineFullError
from jstream.streaming.session import Session
from jstream.streaming.stream import Chunk


def views(seed, count, model):
    """Frames of one stream, unlike those of another."""
    size = model.config.vision.frame_size
    rng = np.random.default_rng(seed)
    return [dataclasses.replace(f, image=rng.integers(0, 256, (*size, 3), np.uint8)) for f in frames(count)]


def decide(stream, script):
    """Has a stream decide as it is told."""
    decisions = iter(script)
    stream.protocol = copy.copy(stream.protocol)
    stream.protocol.decide = lambda *_, **__: next(decisions)


def same(one, other):
    assert (one.time, one.state, one.text, one.start) == (other.time, other.state, other.text, other.start)
    np.testing.assert_allclose([*one.probs.values()], [*other.probs.values()], atol=2e-5)


LENGTHS = (9, 14, 5, 12, 7)  # frames of the streams
QUESTIONS = (
    {0: "Narrate what happens."},
    {3: "What is it?"},
    {},
    {0: "What is it?", 7: "Narrate what happens."},
    {2: "?"},
)


@pytest.mark.parametrize(("name", "memory", "ahead"), [("siglip", "append", 0), ("siglip", "append", 1)])
def test_every_stream_is_what_it_would_be_alone(name, memory, ahead):  # tests/runs/test_streams.py has others
    """Five streams on three places, that come and go at different times."""
    model = model_of(name)
    settings = dict(capacity=2048 if memory == "append" else None, max_new_tokens=4, threshold=0.35)
    engine, session = Engine(model, 3, memory, ahead=ahead, **settings), Session(model, memory, **settings)
    compiled = steps.compile_step.cache_info().misses
    waiting, streams, events = list(range(5)), {}, {number: [] for number in range(5)}
    left = {number: views(number, LENGTHS[number], model) for number in range(5)}
    while waiting or streams:
        while waiting and len(streams) < 3:
            streams[engine.open()] = waiting.pop(0)
        for place, number in list(streams.items()):
            if not left[number]:
                engine.close(place)
                del streams[place]
                continue
            question = QUESTIONS[number].get(LENGTHS[number] - len(left[number]))
            if question:
                engine.ask(place, question)
            engine.see(place, left[number].pop(0))
        for place, event in engine.run():
            events[streams[place]].append(event)
    assert steps.compile_step.cache_info().misses == compiled  # nobody waited for a compiler
    spoken = 0
    for number in range(5):
        session.reset()
        for index, frame in enumerate(views(number, LENGTHS[number], model)):
            if index in QUESTIONS[number]:
                session.ask(QUESTIONS[number][index])
            event = session.see(frame)
            same(events[number][index], event)
            spoken += event.text is not None
        assert len(events[number]) == LENGTHS[number]
    assert 0 < spoken < sum(LENGTHS) or name == "live"  # it speaks at every frame


@pytest.fixture
def begun(monkeypatch):
    """Steps side by side that have been begun, in order: how many streams were under way then, and which it was."""
    steps, under_way, lock = [], set(), threading.Lock()
    step = side_by_side._step

    def noted(batch, wish):
        with lock:
            under_way.add(id(batch))
            steps.append((len(under_way), batch))
        done = step(batch, wish)
        with lock:
            under_way.remove(id(batch))
        return done

    monkeypatch.setattr(side_by_side, "_step", noted)
    return steps


def side_by_side_of(cores, monkeypatch):
    """One stream that replies to its frame, and two that are silent."""
    monkeypatch.setattr(side_by_side, "cores", lambda: cores)
    engine = Engine(make_model(), 3, capacity=512, max_new_tokens=6, ahead=0)
    talker, *watchers = [engine.open() for _ in range(3)]
    decide(engine._places[talker].stream, [RESPONSE] * 9)
    for watcher in watchers:
        decide(engine._places[watcher].stream, [SILENCE] * 9)
    return engine, talker, watchers


def test_one_core_finishes_a_reply_before_the_next_frame_and_serves_the_oldest_first(begun, monkeypatch):
    engine, talker, watchers = side_by_side_of(1, monkeypatch)
    for place in (watchers[1], talker, watchers[0]):
        engine.see(place, frames(1)[0])
    ended = [place for place, _ in engine.run()]
    assert ended == [watchers[1], talker, watchers[0]]
    assert {count for count, _ in begun} == {1}
    places = [engine.batch.batches.index(batch) for _, batch in begun]
    assert places[2:-1] == [talker] * (len(places) - 3) and len(places) > 5


def test_each_core_is_at_a_stream_of_its_own(begun, monkeypatch):
    engine, talker, watchers = side_by_side_of(2, monkeypatch)
    for frame in frames(4):
        for place in engine.places:
            engine.see(place, frame)
    ended = [place for place, _ in engine.run()]
    assert sorted(ended) == sorted([*engine.places] * 4)
    assert {count for count, _ in begun} == {1, 2}
    of_talker = [index for index, (_, batch) in enumerate(begun) if batch is engine.batch.batches[talker]]
    assert of_talker[5] > of_talker[0] + 5  # another has seen frames during its first reply


def test_a_step_that_is_not_waited_for_tells_when_it_is_done(monkeypatch):
    engine, _, (place, other) = side_by_side_of(2, monkeypatch)
    let, done, step = threading.Event(), threading.Event(), side_by_side._step
    monkeypatch.setattr(side_by_side, "_step", lambda *what: (let.wait(30), step(*what))[1])
    assert not engine.ready
    engine.see(place, frames(1)[0])
    assert engine.ready
    assert engine.step(done.set) == [] and engine.busy and not engine.ready and not done.is_set()
    engine.see(other, frames(1)[0])
    assert engine.ready  # a core is free
    assert engine.step(done.set) == [] and not engine.ready
    let.set()
    assert done.wait(30)
    ended = []
    while engine.busy:
        ended += engine.step()
    assert sorted(number for number, _ in ended) == sorted([place, other])
    assert not engine.ready and engine.step(done.set) == []


def test_a_stream_that_is_closed_in_the_middle_of_a_step_leaves_nothing_behind(monkeypatch):
    engine, talker, (place, other) = side_by_side_of(2, monkeypatch)
    let, step = threading.Event(), side_by_side._step
    monkeypatch.setattr(side_by_side, "_step", lambda *what: (let.wait(30), step(*what))[1])
    for one in engine.places:
        engine.see(one, frames(1)[0])
    assert engine.step(lambda: None) == [] and engine.busy
    threading.Timer(0.1, let.set).start()
    engine.close(talker)  # waits for its step
    assert let.is_set()
    assert {number for number, _ in engine.run()} == {place, other}
    assert engine.open() == talker
    session = Session(make_model(), capacity=512, max_new_tokens=6)
    decide(engine._places[talker].stream, [SILENCE] * 3)
    decide(session.stream, [SILENCE] * 3)
    for frame in frames(3):
        engine.see(talker, frame)
    for (_, event), frame in zip(list(engine.run()), frames(3), strict=True):
        same(event, session.see(frame))


def test_a_stream_may_look_back_over_less_and_be_told_when_to_speak():
    engine = Engine(make_model(), 3, "sinks:20", max_new_tokens=2, ahead=0)
    short, whole = engine.open(memory="sinks:5", threshold=0.0, fps=2.0), engine.open()
    with pytest.raises(ConfigError, match="expected sinks:20 or fewer turns of it, .* found 'sinks:21'"):
        engine.open(memory="sinks:21")
    with pytest.raises(ConfigError, match="found 'window:5'"):
        engine.open(memory="window:5")
    engine.set_threshold(whole, 1.0)
    for frame in frames(12):
        engine.see(short, frame)
        engine.see(whole, frame)
    states = {short: set(), whole: set()}
    for place, event in engine.run():
        states[place].add(event.state)
    assert states[short] == {"response"} and "response" not in states[whole]
    assert engine.used(short) < engine.used(whole) <= engine.capacity
    session = Session(make_model(), "sinks:5", fps=2.0, threshold=0.0, max_new_tokens=2)
    engine.close(short)
    place = engine.open(memory="sinks:5", threshold=0.0, fps=2.0)
    for frame in frames(12):
        engine.see(place, frame)
    for (_, event), frame in zip(list(engine.run()), frames(12)):
        same(event, session.see(frame))


def test_a_word_and_a_frame_share_a_forward():
    engine = Engine(make_model(), 3, capacity=512, max_new_tokens=6, ahead=1)
    talker, watcher = engine.open(), engine.open()
    decide(engine._places[talker].stream, [RESPONSE] * 2)
    decide(engine._places[watcher].stream, [SILENCE] * 9)
    done, fed = engine.batch.do, []
    engine.batch.do = lambda wishes, *_: (fed.append({p: len(w.tokens) for p, w in wishes.items()}), done(wishes))[1]
    for frame in frames(7):
        engine.see(watcher, frame)
    engine.see(talker, frames(1)[0])
    ended = list(engine.run())
    assert [place for place, _ in ended].count(watcher) == 7 and len(ended) == 8
    shared = [wishes for wishes in fed if len(wishes) == 2]
    assert len(shared) >= 3 and any(wishes[talker] == 1 < wishes[watcher] for wishes in shared)


def test_one_that_fails_ends_alone():
    model = make_model()
    engine = Engine(model, 3, capacity=512, max_new_tokens=4)
    places = [engine.open() for _ in range(3)]
    decide(engine._places[places[1]].stream, [RESPONSE] * 99)  # it talks until its cache is full
    for place in (0, 2):
        decide(engine._places[place].stream, [SILENCE] * 99)
    session = Session(model, capacity=512)
    decide(session.stream, [SILENCE] * 99)
    failed, others = None, []
    for frame in frames(34):
        for place in engine.places:
            engine.see(place, frame)
        for place, event in engine.run():
            if isinstance(event, Exception):
                failed = place, event
            elif place == 0:
                others.append(event)
    assert failed is not None and failed[0] == 1 and isinstance(failed[1], CacheFullError)
    assert engine.places == (0, 2)
    for event, frame in zip(others, frames(34), strict=True):
        same(event, session.see(frame))
    assert engine.open() == 1  # its place is free again


def test_what_is_asked_while_a_turn_is_under_way_is_heard_with_the_next_frame():
    engine = Engine(make_model(), 3, capacity=512, max_new_tokens=6)
    place = engine.open()
    decide(engine._places[place].stream, [RESPONSE, SILENCE])
    done, fed = engine.batch.do, []
    engine.batch.do = lambda wishes, *_: (fed.append(wishes[place]), done(wishes))[1]
    engine.ask(place, "Narrate what happens.")
    for frame in frames(2):
        engine.see(place, frame)
    engine.step()
    engine.ask(place, "What is it?")
    assert len(list(engine.run())) == 2
    stream = engine.model.protocol.tokenizer
    texts = [stream._inner.decode(c.tokens) for c in fed if isinstance(c, Chunk) and c.sight is not None]
    assert ["Narrate" in text for text in texts] == [True, False] and ["What is it" in t for t in texts] == [
        False,
        True,
    ]


def test_places_and_queues_have_an_end():
    engine = Engine(make_model(), 3, capacity=512, max_queued=2)
    place, *others = [engine.open() for _ in range(3)]
    with pytest.raises(EngineFullError, match="has 3 places and all are taken"):
        engine.open()
    for frame in frames(2):
        engine.see(place, frame)
    with pytest.raises(EngineFullError, match="at most 2 frames to wait"):
        engine.see(place, frames(1)[0])
    assert engine.busy
    engine.close(place)
    assert engine.places == tuple(others)
    assert not engine.busy and list(engine.run()) == []
    with pytest.raises(ConfigError, match="at least one place"):
        Engine(make_model(), 0)


@pytest.mark.parametrize("ahead", [0, 1])
def test_the_cache_of_all_streams_is_donated(ahead):
    engine = Engine(make_model(), 3, capacity=512, ahead=ahead)
    batches = [engine.batch] if ahead else engine.batch.batches
    size = sum(x.nbytes for x in jax.tree.leaves(batches[0].cache))
    assert all(p.memory_analysis().alias_size_in_bytes >= size for p in batches[0].programs.values())
    where = [x.unsafe_buffer_pointer() for batch in batches for x in batch.cache.keys]
    place = engine.open()
    for frame in pictures(engine.model, 3):
        engine.see(place, frame)
    list(engine.run())
    assert [x.unsafe_buffer_pointer() for batch in batches for x in batch.cache.keys] == where
