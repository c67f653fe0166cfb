"""What is dispatched before it is known to be wanted: streams see and say what they would without."""

import collections

import pytest
from test_engine import decide, same, views
from test_memory import model_of
from test_session import frames, make_model

from jstream.protocols.protocol import RESPONSE, SILENCE
from jstream.streaming.engine import Engine
from jstream.streaming.memory import Places
from jstream.streaming.session import Session
from jstream.streaming.step import FED_BACK

FRAMES = 16


class Watched:
    """Counts what a batch is given, and what streams take back."""

    def __init__(self, monkeypatch, batch):
        self.fed, self.steps, self.taken_back = collections.Counter(), [], 0
        do, go_back = batch.do, Places.go_back

        def counted(wishes, *_):
            self.steps.append(len(wishes))
            for wish in wishes.values():
                tokens = getattr(wish, "tokens", [])
                self.fed["frames"] += getattr(wish, "sight", None) is not None
                self.fed["words ahead"] += tokens == [FED_BACK]
            return do(wishes)

        def noted(places, mark):
            self.taken_back += 1
            return go_back(places, mark)

        batch.do = counted
        monkeypatch.setattr(Places, "go_back", noted)


@pytest.mark.parametrize(("name", "memory"), [("siglip", "append")])  # others in tests/runs
def test_guessing_that_a_frame_deserves_no_word_changes_nothing(name, memory, monkeypatch):
    model = model_of(name)
    settings = dict(capacity=2048 if memory == "append" else None, max_new_tokens=4, threshold=0.35)
    engine, session = Engine(model, 3, memory, ahead=2, **settings), Session(model, memory, ahead=0, **settings)
    count, asked = Watched(monkeypatch, engine.batch), {3: "What is it?", 9: "Narrate what happens."}
    places = [engine.open() for _ in range(3)]
    events = {place: [] for place in places}
    for place in places:
        for index, frame in enumerate(views(place, FRAMES, model)):
            engine.see(place, frame, [asked[index]] if index in asked else [])
    for place, event in engine.run():
        events[place].append(event)
    spoken = 0
    for place in places:
        session.reset()
        for index, frame in enumerate(views(place, FRAMES, model)):
            if index in asked:
                session.ask(asked[index])
            event = session.see(frame)
            same(events[place][index], event)
            spoken += event.text is not None
    assert spoken and count.fed["words ahead"]
    if memory != "reprefill:4":
        assert count.fed["frames"] > 3 * FRAMES  # some guesses were wrong
        assert count.taken_back


def test_a_right_guess_costs_nothing_and_a_wrong_one_a_frame(monkeypatch):
    engine = Engine(make_model(), 1, capacity=1024, max_new_tokens=4, ahead=1)
    place = engine.open()
    decide(engine._places[place].stream, [SILENCE] * 5 + [RESPONSE] + [SILENCE] * 6)
    count = Watched(monkeypatch, engine.batch)
    for frame in frames(12):
        engine.see(place, frame)
    assert len(list(engine.run())) == 12
    assert count.fed["frames"] == 13


def test_a_frame_with_a_question_is_not_guessed(monkeypatch):
    engine = Engine(make_model(), 1, capacity=1024, ahead=1)
    place = engine.open()
    decide(engine._places[place].stream, [RESPONSE] * 4)
    count = Watched(monkeypatch, engine.batch)
    for frame in frames(4):
        engine.see(place, frame, ["What is it?"])
    list(engine.run())
    assert count.fed["frames"] == 4


@pytest.mark.parametrize(("memory", "temperature"), [("append", 0.0), ("sinks:4", 0.8)])  # others in tests/runs
def test_words_that_are_fed_back_on_the_device_are_those_that_the_host_reads(memory, temperature, monkeypatch):
    model, settings = make_model(), dict(max_new_tokens=6, threshold=0.3, temperature=temperature, seed=3)
    capacity = 1024 if memory == "append" else None
    at_once, ahead = (Session(model, memory, capacity, ahead=ahead, **settings) for ahead in (0, 3))
    count, spoken = Watched(monkeypatch, ahead.batch), set()
    for frame in frames(14):
        one, other = at_once.see(frame), ahead.see(frame)
        same(one, other)
        spoken.add(one.text)
    assert len(spoken) >= 3 and count.fed["words ahead"] >= 8
