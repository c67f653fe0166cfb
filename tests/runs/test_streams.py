"""What is claimed of rings and engines, for other protocols, towers and memories than the quick tests take."""

import collections

import numpy as np
import pytest
import test_ahead
import test_engine
import test_memory
import test_rings
from test_engine import decide, same
from test_session import SCRIPT, Watcher, frames, make_model
from test_training import CONFIG

from jstream.benchmarks import streams
from jstream.models.cache import LIVE
from jstream.protocols.protocol import RESPONSE, SILENCE
from jstream.streaming import batch
from jstream.streaming.batch import reads_for
from jstream.streaming.engine import Engine
from jstream.streaming.session import Session


@pytest.mark.parametrize(("name", "memory"), [("siglip", "window:4"), ("qwen", "sinks:4"), ("live", "sinks:4")])
def test_every_decision_sees_the_turns_that_are_kept_and_no_others(name, memory, monkeypatch):
    test_rings.test_every_decision_sees_the_turns_that_are_kept_and_no_others(name, memory, monkeypatch)


@pytest.mark.parametrize(
    ("name", "memory"), [("qwen", "reprefill:5"), ("live", "reprefill:5"), ("qwen", "last_frames:4"), ("qwen", "hop:6")]
)
def test_every_decision_is_that_of_a_fresh_prompt_of_what_is_kept(name, memory):
    test_memory.test_every_decision_is_that_of_a_fresh_prompt_of_what_is_kept(name, memory)


def test_programs_of_accelerators_see_what_those_of_cpus_see(monkeypatch):
    def probs():
        watched = Watcher(make_model(), capacity=1024, max_new_tokens=5, script=SCRIPT)
        return [[*watched.see(frame).probs.values()] for frame in frames(len(SCRIPT))], watched.batch.programs

    live, programs = probs()
    assert {reads for *_, reads in programs} == {LIVE}
    monkeypatch.setattr(batch, "reads_for", lambda platform, ring, slots: reads_for("gpu", ring, slots))
    monkeypatch.setattr(batch, "READS", 100)
    fixed, programs = probs()
    assert {reads for *_, reads in programs} >= {100, 400}
    np.testing.assert_allclose(live, fixed, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "memory"), [("qwen", "append"), ("live", "append"), ("siglip", "sinks:4"), ("siglip", "reprefill:4")]
)
def test_every_stream_is_what_it_would_be_alone(name, memory):
    test_engine.test_every_stream_is_what_it_would_be_alone(name, memory, ahead=1)


@pytest.mark.parametrize(
    ("name", "memory"), [("siglip", "sinks:4"), ("live", "sinks:4"), ("qwen", "append"), ("siglip", "reprefill:4")]
)
def test_guessing_that_a_frame_deserves_no_word_changes_nothing(name, memory, monkeypatch):
    test_ahead.test_guessing_that_a_frame_deserves_no_word_changes_nothing(name, memory, monkeypatch)


@pytest.mark.parametrize(("memory", "temperature"), [("append", 0.8), ("sinks:4", 0.0), ("hop:6", 0.0), ("hop:6", 0.8)])
def test_words_that_are_fed_back_on_the_device_are_those_that_the_host_reads(memory, temperature, monkeypatch):
    test_ahead.test_words_that_are_fed_back_on_the_device_are_those_that_the_host_reads(
        memory, temperature, monkeypatch
    )


def test_a_few_of_many_streams_have_a_small_step():
    model = make_model()
    engine = Engine(model, 8, capacity=512, max_new_tokens=4, ahead=1)
    places = [engine.open() for _ in range(8)]
    for place in places:
        decide(engine._places[place].stream, [RESPONSE if place in (2, 5) else SILENCE] * 9)
    used, programs = collections.Counter(), dict(engine.batch.programs)
    for key, program in programs.items():
        counted = lambda *args, key=key, program=program: (used.update([(key.kind, key.rows)]), program(*args))[1]
        engine.batch.programs[key] = counted
    events = {place: [] for place in places}
    for frame in frames(6):
        for place in places:
            engine.see(place, frame)
        for place, event in engine.run():
            events[place].append(event)
    assert used["turn", 8] == 6 and used["text", 4] >= 12 and used["text", 8] == 0
    for place in (2, 3):
        session = Session(model, capacity=512, max_new_tokens=4)
        decide(session.stream, [RESPONSE if place == 2 else SILENCE] * 9)
        for event, frame in zip(events[place], frames(6), strict=True):
            same(event, session.see(frame))


def test_the_bench_of_streams_counts_every_frame_and_compares_what_was_said(monkeypatch):
    monkeypatch.setattr(streams, "ROUNDS", 1)
    found = {figure.key: figure.value for figure in streams.measure_engine(CONFIG, 3, 5, "sinks:3")}
    assert found["events_equal"] == 1 and found["max_probability_difference"] < 1e-4
    assert found["streams"] == 3 and found["frames_a_stream"] == 5
    assert min(found["sessions_frames_per_second"], found["engine_frames_per_second"], found["ratio"]) > 0
    assert 0 < found["engine_event_ms_median"] <= found["engine_event_ms_p95"]


def test_a_long_run_tells_whether_anything_grows_or_is_compiled():
    found = {figure.key: figure.value for figure in streams.measure_longrun(CONFIG, 60, "sinks:4")}
    assert found["frames"] == 60 and found["compiled_while_running"] == 0
    assert found["late_ms_median"] > 0 and found["late_resident_mib"] > 0
