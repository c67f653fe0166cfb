"""Several sources watched together: each to its own end, whatever the others do."""

import threading

import pytest
from test_engine import decide, same, views
from test_session import frames, make_model

from jstream.data.video import VideoError
from jstream.models.cache import CacheFullError
from jstream.protocols.protocol import RESPONSE, SILENCE
from jstream.streaming.engine import Engine
from jstream.streaming.event import Event
from jstream.streaming.feeds import QUEUED, Ended, watch
from jstream.streaming.session import Session


def broken(seen):
    yield from seen
    raise VideoError("a.mp4: expected more, found nothing")


def test_every_source_is_watched_to_its_own_end():
    model = make_model()
    engine = Engine(model, 3, capacity=512, threshold=0.5, max_new_tokens=3, max_queued=2)
    seen = {engine.open(): views(number, count, model) for number, count in enumerate((6, 3, 9))}
    sources = {0: iter(seen[0]), 1: broken(seen[1]), 2: seen[2]}
    asked = lambda place, frame: ["What is it?"] if (place, frame.time) == (2, 4.0) else []
    events, ends = {place: [] for place in seen}, {}
    for place, event in watch(engine, sources, asked):
        if isinstance(event, Event):
            assert place not in ends
            events[place].append(event)
        else:
            ends[place] = event
    assert ends[0] == ends[2] == Ended() and str(ends[1].error).startswith("a.mp4: expected more")
    assert engine.places == ()
    session = Session(model, capacity=512, threshold=0.5, max_new_tokens=3)
    for place, own in events.items():
        session.reset()
        for event, frame in zip(own, seen[place], strict=True):
            if (place, frame.time) == (2, 4.0):
                session.ask("What is it?")
            same(event, session.see(frame))


def test_a_stream_that_fails_stops_its_source_and_no_other():
    engine = Engine(make_model(), 3, capacity=512, max_new_tokens=4)
    for script in ([RESPONSE] * 99, [SILENCE] * 5):
        decide(engine._places[engine.open()].stream, script)
    taken = []

    def endless():
        for frame in frames(1000):
            taken.append(frame)
            yield frame

    last = dict(watch(engine, {0: endless(), 1: frames(5)}))
    assert isinstance(last[0].error, CacheFullError) and last[1] == Ended()
    assert len(taken) < 50


def test_no_more_is_decoded_than_can_wait_and_leaving_ends_the_threads():
    engine = Engine(make_model(), 3, capacity=512)
    decide(engine._places[engine.open()].stream, [SILENCE] * 99)
    taken = []

    def endless():
        for frame in frames(1000):
            taken.append(frame)
            yield frame

    decoding = lambda: [thread for thread in threading.enumerate() if "_decode" in thread.name]
    stream = watch(engine, {0: endless()})
    for number in range(5):
        next(stream)
        assert len(taken) <= number + 1 + QUEUED + 2  # those that wait, one that is read, one under way
    assert decoding()
    stream.close()
    assert not decoding()


@pytest.mark.parametrize("error", [KeyError("x"), OSError("disk")])
def test_an_error_of_a_source_comes_through(error):
    engine = Engine(make_model(), 3, capacity=512)
    engine.open()

    def source():
        raise error
        yield

    assert list(watch(engine, {0: source()})) == [(0, Ended(error))]
