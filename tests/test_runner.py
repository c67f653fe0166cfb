"""The runner of benchmarks, with scripts in place of a model: what is asked, when, and what becomes of replies."""

import collections
import contextlib
import json
import math
import subprocess
import sys
import threading
import types

import pytest
import world_exam

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.data.prepare.videos import Folder
from jstream.data.video import VideoError
from jstream.evals import contest, ovo_bench, run_ovo, run_streamingbench, runner, streamingbench
from jstream.evals.exam import Exam, Question, Said, Watch, always_respond, always_silent, answers_of
from jstream.evals.progress import Progress
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY
from jstream.streaming.event import Event
from jstream.streaming.memory import Memory
from jstream.streaming.stream import MAX_QUERY


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with `videos/` and `ovo.json`."""
    folder = tmp_path_factory.mktemp("world")
    world_exam.write_ovo(folder)
    return folder


@pytest.fixture
def ovo(shared_data):
    return shared_data / "annotations/ovo_bench/ovo_bench_new.json"


class Script:
    """An engine whose streams say what a function of (question, second) tells them, or nothing."""

    memory = Memory()
    model = types.SimpleNamespace(protocol=types.SimpleNamespace(decide=lambda *_: RESPONSE))

    def __init__(self, streams, says=lambda asked, second: None):
        self.streams, self.says, self.compile_seconds = streams, says, 0.0
        self.frames, self.heard, self.most = {}, {}, 0

    def open(self, protocol):
        place = next(i for i in range(self.streams) if i not in self.frames)
        self.frames[place], self.heard[place] = collections.deque(), (protocol, None)
        self.most = max(self.most, len(self.frames))
        return place

    places = property(lambda self: tuple(self.frames))
    busy = property(lambda self: any(self.frames.values()))

    def close(self, place):
        del self.frames[place]

    def waits(self, place):
        return bool(self.frames[place])

    def queued(self, place):
        return len(self.frames[place])

    def see(self, place, frame, asked=()):
        if any("refused" in text for text in asked):
            raise ValueError("a question: expected fewer tokens")
        self.frames[place].append((frame, "\n".join(asked)))

    def step(self):
        events = []
        for place in [place for place, waiting in self.frames.items() if waiting]:
            frame, asked = self.frames[place].popleft()
            protocol, question = self.heard[place]
            self.heard[place] = protocol, question or asked or None
            speaks = protocol.decide((), None, bool(asked)) == RESPONSE
            text = self.says(self.heard[place][1], frame.time) if speaks else None
            events.append((place, Event(frame.time, "response" if text else "silence", {}, text)))
        return events


def answer(engine, questions, folder, fps=1.0):
    """What came of each question: answer, failure, short."""
    clock = runner.Clock()
    done = {one.question: one[1:] for one in runner.sit(engine, questions, Folder(folder), fps, clock)}
    assert len(done) == len(questions) and engine.places == ()
    return done, clock


def once(video, watch):
    """A question that returns what was said in one watch."""

    def begin():
        return [tuple(said) for said in (yield watch)]

    return Question(video, begin)


VIDEO = "x/000000.mp4"  # found by its name


# ------------------------------------------------------------------------------------------------------------- watching


@pytest.mark.parametrize(
    ("watch", "times", "asked"),
    [
        (Watch("?", "", until=5.5, forced=True), [0, 1, 2, 3, 4, 5], 5),
        (Watch("?", "", until=5.0, forced=True), [0, 1, 2, 3, 4], 4),
        (Watch("?", "", until=0.0, forced=True), [0], 0),
        (Watch("?", "", at=2.0, until=5.0), [0, 1, 2, 3, 4], 2),
        (Watch("?", "", at=9.0, until=5.0), [0, 1, 2, 3, 4], 4),
        (Watch("?", "", start=3.0, at=5.0, until=7.0), [0, 1, 2, 3], 2),
        (Watch("?", "", start=3.0, until=3.0, forced=True), [0], 0),
    ],
)
def test_a_watch_is_its_part_of_the_video_with_the_question_at_its_time(world, watch, times, asked):
    shown = list(runner.frames_of(world / "videos/000000.mp4", watch, 1.0))
    assert [one.frame.time for one in shown] == times
    assert [one.frame.time for one in shown if one.asks] == [asked]


def test_a_video_that_is_too_short_is_asked_at_its_end(world):
    for watch in (Watch("?", "", until=400.0, forced=True), Watch("?", "", at=300.0)):
        shown = list(runner.frames_of(world / "videos/000000.mp4", watch, 1.0))
        assert 12 <= len(shown) <= 15 and [one.asks for one in shown] == [False] * (len(shown) - 1) + [True]
    with pytest.raises(VideoError, match="more than 90 s"):
        list(runner.frames_of(world / "videos/000000.mp4", Watch("?", "", start=90.0), 1.0))


def test_frames_that_a_forced_answer_does_not_depend_on_are_not_shown(world):
    path = world / "videos/000000.mp4"
    shown = list(runner.frames_of(path, Watch("?", "", until=9.0, forced=True), 1.0, keeps=4))
    assert [one.frame.time for one in shown] == [4, 5, 6, 7, 8] and shown[-1].asks
    assert len(list(runner.frames_of(path, Watch("?", "", at=3.0, until=9.0), 1.0, keeps=4))) == 9


def test_a_stream_says_nothing_before_it_is_asked():
    protocol = types.SimpleNamespace(decide=lambda scores, threshold=None, asked=False: scores)
    own = runner._heard_first(protocol, forced=False).decide
    assert [own(RESPONSE), own(STANDBY, asked=True), own(RESPONSE)] == [SILENCE, STANDBY, RESPONSE]
    forced = runner._heard_first(protocol, forced=True).decide
    assert [forced(RESPONSE), forced(STANDBY, asked=True), forced(RESPONSE)] == [SILENCE, RESPONSE, SILENCE]
    assert protocol.decide(RESPONSE) == RESPONSE


def test_a_long_prompt_comes_in_pieces_that_a_stream_takes():
    text = "\n".join(["word " * 300] * 3) + "x" * 5000
    pieces = runner._pieces(text)
    assert max(map(len, pieces)) <= MAX_QUERY
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert runner._pieces("What?") == ["What?"]


# -------------------------------------------------------------------------------------------------------------- sitting


def test_more_questions_than_places_are_all_answered(world):
    says = lambda asked, second: f"{asked} {second:g}"
    questions = {str(i): once(VIDEO, Watch(f"q{i}", "", until=i % 5 + 2.0, forced=True)) for i in range(11)}
    done, clock = answer(engine := Script(3, says), questions, world / "videos")
    assert engine.most == 3 and clock.questions == 11 and clock.frames == sum(i % 5 + 2 for i in range(11))
    assert done == {str(i): ([(i % 5 + 1.0, f"q{i} {i % 5 + 1}")], None, False) for i in range(11)}


def test_a_stream_ends_with_its_first_reply_or_goes_on(world):
    says = lambda asked, second: "now" if second in (4, 6) else None
    first, all_ = Watch("?", "", at=1.0, start=2.0, until=11.0), Watch("?", "", at=1.0, until=11.0, first=False)
    done, clock = answer(Script(2, says), {"a": once(VIDEO, first), "b": once(VIDEO, all_)}, world / "videos")
    assert done["a"][0] == [(6.0, "now")], "times are those of the video"
    assert done["b"][0] == [(4.0, "now"), (6.0, "now")] and clock.frames == 5 + 11


def test_a_question_may_ask_on_from_what_was_said(world):
    def begin():
        said, until = [], 2.0
        while not said:
            said = [one for one in (yield Watch(f"{until}", "", until=until, forced=True)) if one.text == "yes"]
            until += 1
        return said[0].time

    says = lambda asked, second: "yes" if second == 5 else "no"
    assert answer(Script(1, says), {"q": Question(VIDEO, begin)}, world / "videos")[0] == {"q": (5.0, None, False)}


def test_a_missing_or_broken_video_fails_its_questions_alone(world, tmp_path):
    (tmp_path / "000000.mp4").symlink_to(world / "videos/000000.mp4")
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "empty.mp4").write_bytes(b"")
    watch = Watch("?", "", until=4.0, forced=True)
    names = ["missing.mp4", "broken.mp4", "000000.mp4", "empty.mp4", "000000.mp4"]
    questions = {f"{i} {name}": once(name, watch) for i, name in enumerate(names)}
    questions["5 refused"] = once(VIDEO, Watch("refused", "", until=4.0, forced=True))
    done, _ = answer(Script(2, lambda *_: "A"), questions, tmp_path)
    assert {name for name, (said, failure, _) in done.items() if failure is None} == {"2 000000.mp4", "4 000000.mp4"}
    assert done["0 missing.mp4"] == (None, "missing.mp4: its video is missing", False)
    assert done["1 broken.mp4"][1].startswith("broken.mp4: ") and str(tmp_path) not in done["1 broken.mp4"][1]
    assert "expected fewer tokens" in done["5 refused"][1]


def test_a_video_that_stands_still_does_not_hold_up_the_rest(world, monkeypatch, tmp_path):
    for name in ("000000.mp4", "still.mp4"):
        (tmp_path / name).symlink_to(world / "videos/000000.mp4")
    real, going_on = runner.open_video, threading.Event()

    @contextlib.contextmanager
    def opened(path, *args, **options):
        if path.name == "still.mp4":
            going_on.wait(20)
        with real(path, *args, **options) as video:
            yield video

    monkeypatch.setattr(runner, "open_video", opened)
    monkeypatch.setattr(runner, "PATIENCE", 1.0)
    watch = Watch("?", "", until=4.0, forced=True)
    questions = {"still": once("still.mp4", watch), **{str(i): once("000000.mp4", watch) for i in range(4)}}
    done, _ = answer(Script(2, lambda *_: "A"), questions, tmp_path)
    going_on.set()
    assert "expected a frame within 1 s" in done.pop("still")[1]
    assert all(failure is None for _, failure, _ in done.values())


def test_a_video_that_ends_early_is_told_of(world):
    watches = {
        "far": Watch("?", "", until=90.0, forced=True),
        "late": Watch("?", "", at=90.0),
        "in": Watch("?", "", at=2.0, until=10.2),
    }
    for says in (lambda *_: None, lambda *_: "yes"):
        done, _ = answer(Script(2, says), {n: once(VIDEO, watch) for n, watch in watches.items()}, world / "videos")
        assert {name: short for name, (*_, short) in done.items()} == {"far": True, "late": True, "in": False}


# ------------------------------------------------------------------------------------------------------------ OVO-Bench


def score_ovo(tmp_path, annotations, exam, says):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(exam.predictions(answers_of(exam, says))))
    return ovo_bench.score(annotations, path)


def test_a_prompt_of_the_official_protocol_ends_the_clip_of_each_question_and_probe(ovo):
    exam = run_ovo.exam(ovo, "official")
    watches = []
    answers_of(exam, lambda watch: watches.append(watch) or [])
    assert len(exam.questions) == 1640 and len(watches) == 3035
    assert all(watch.forced and math.isinf(watch.at) and watch.start == 0 for watch in watches)
    records = json.loads(ovo.read_text())
    times = [p["realtime"] for r in records for p in r.get("test_info", [r])]
    assert [watch.until for watch in watches] == times
    assert "C. a person with blue shirt; D." in watches[0].ask and "e.g., A, B, C" in watches[0].ask
    assert max(len(watch.ask) for watch in watches) > MAX_QUERY - 300


@pytest.mark.parametrize("protocol", ["official", "streaming"])
def test_who_is_always_silent_or_always_responds_is_scored_from_the_annotations_alone(ovo, tmp_path, protocol):
    exam = run_ovo.exam(ovo, protocol)
    silent, says = (score_ovo(tmp_path, ovo, exam, who) for who in (always_silent, always_respond))
    records = json.loads(ovo.read_text())
    share = lambda of: pytest.approx(100 * sum(of) / len(of))
    first = [record["gt"] == 0 for record in records if record["task"] == "EPM"]
    assert silent.metrics["EPM"] == 0 and says.metrics["EPM"] == share(first)
    kinds = {task: [p["type"] for r in records if r["task"] == task for p in r["test_info"]] for task in ("SSR", "CRR")}
    assert says.metrics["SSR"] == share(kinds["SSR"])
    no = [not kind for kind in kinds["CRR"]]
    if protocol == "official":
        assert silent.metrics["CRR"] == silent.metrics["REC"] == 0 and says.metrics["CRR"] == share(kinds["CRR"])
    else:
        assert silent.metrics["CRR"] == share(no) and silent.metrics["SSR"] == share([not k for k in kinds["SSR"]])


def streamed(world, task, *replies, **change):
    """The answer to a record of a task, if each of its watches hears the next replies; and the watches."""
    record = next(r for r in json.loads((world / "ovo.json").read_text()) if r["task"] == task) | change
    asking, watches = run_ovo._streaming(record, "here", "0:1")(), []
    try:
        watches.append(next(asking))
        for said in replies:
            watches.append(asking.send([Said(*one) for one in said]))
    except StopIteration as end:
        return end.value, watches
    raise AssertionError("it asks on")


@pytest.mark.parametrize(
    ("said", "answer"),
    [("B. An Apple", "B"), ("(C) Dogs", "C"), ("Dogs", "Dogs"), (" A", "A"), ("Apples are B.", "Apples are B.")],
)
def test_a_choice_is_the_letter_that_the_reply_begins_with(world, said, answer):
    found, (watch,) = streamed(world, "EPM", [(12.0, said)], realtime=10.5)
    assert found == answer and watch.at == 10 and watch.first and not watch.forced and math.isinf(watch.until)
    assert streamed(world, "EPM", [])[0] is None


def test_a_question_of_asi_is_asked_at_a_time_that_the_seed_draws(ovo):
    def times(seed):
        exam, found = run_ovo.exam(ovo, "streaming", seed), {}
        for name in [str(r["id"]) for r in json.loads(ovo.read_text()) if r["task"] == "ASI"]:
            found[name] = next(exam.questions[name].begin()).at
        return found

    realtime = {str(r["id"]): r["realtime"] for r in json.loads(ovo.read_text()) if r["task"] == "ASI"}
    assert times(3) == times(3) != times(4)
    assert all(0 <= at <= realtime[name] for name, at in times(3).items())


def test_probes_of_crr_are_affirmed_behind_the_first_reply(world):
    probes = [{"realtime": time, "type": 0} for time in (4, 5, 6.5)]
    answer, (watch,) = streamed(world, "CRR", [(5.0, "It moves.")], test_info=probes, ask_time=2)
    assert answer == ["No", "No", "Yes"] and (watch.at, watch.until) == (2, 6.5)
    assert watch.ask == "Tell me what happens."


def test_probes_of_ssr_are_affirmed_within_the_span_that_was_named(world):
    steps, starts = ["open", "close"], [2, 7]
    probes = [{"realtime": time, "step": step, "type": 0} for step in steps for time in (3, 4, 8, 9)]
    said = [(6.0, "From 4s to 8s.")], [(9.0, "It closes.")]
    given = dict(all_steps=steps, start_time=starts, test_info=probes)
    answer, watches = streamed(world, "SSR", *said, **given)
    assert answer == ["No", "Yes", "Yes", "No"] + ["No"] * 4 and [watch.at for watch in watches] == [2, 7]
    assert "'open'" in watches[0].ask and "'close'" in watches[1].ask


def test_a_count_is_that_of_the_last_reply_before_the_probe(world):
    probes = [{"realtime": time, "count": 0} for time in (5, 7, 9, 12)]
    said = [(5.0, "A"), (7.0, "well"), (8.0, "B. 2"), (11.0, "10")]
    answer, (watch,) = streamed(world, "REC", said, test_info=probes, start_times=[6, 8])
    assert answer == ["0", "1", "2", "10"] and (watch.at, watch.until, watch.first) == (3, 12, False)
    assert "B. 2\n" in watch.ask


def test_a_question_without_an_answer_is_wrong_in_all_its_probes(world, tmp_path):
    exam = run_ovo.exam(world / "ovo.json", "official")
    path = tmp_path / "p.json"
    path.write_text(json.dumps(exam.predictions({"0": "D"})))
    found = ovo_bench.score(world / "ovo.json", path)
    assert found.cases["CRR"] == (0, 2) and found.cases["SSR"][0] == 0 and found.cases["EPM"][1] == 1


@pytest.mark.parametrize(
    "change", [{"realtime": None}, {"options": None}, {"video": 3}, {"question": None}, {"task": None}, {"id": None}]
)
@pytest.mark.parametrize("protocol", ["official", "streaming"])
def test_a_question_that_cannot_be_asked_is_an_error_with_its_place(world, tmp_path, change, protocol):
    records = json.loads((world / "ovo.json").read_text())
    records[1] |= change
    (tmp_path / "a.json").write_text(json.dumps(records))
    with pytest.raises(DialogueError, match=r"a\.json, record 1.*expected ") as error:
        run_ovo.exam(tmp_path / "a.json", protocol)
    assert next(iter(change)) in str(error.value)
    (tmp_path / "a.json").write_text(json.dumps([records[0], records[0]]))
    with pytest.raises(DialogueError, match="second time"):
        run_ovo.exam(tmp_path / "a.json", protocol)


# ------------------------------------------------------------------------------------------------------- StreamingBench


def sb(shared_data, tmp_path, name, protocol, says, **options):
    """The report of what a script says, and the watches."""
    path = shared_data / f"annotations/streamingbench/questions_{name}.json"
    exam, watches = run_streamingbench.exam(path, protocol, **options), []
    answers = answers_of(exam, lambda watch: watches.append(watch) or says(watch))
    (tmp_path / "p.json").write_text(json.dumps(exam.predictions(answers)))
    return streamingbench.score(path, tmp_path / "p.json"), watches


def test_choices_are_asked_at_the_end_of_the_minute_before(shared_data, tmp_path):
    found, watches = sb(shared_data, tmp_path, "real", "official", always_respond)
    assert len(watches) == 2500 and 20 < found.metrics["total"] < 30
    assert (watches[0].start, watches[0].until, watches[0].forced) == (0, 31, True)
    assert {watch.until - watch.start for watch in watches if watch.until > 60} == {60}
    assert "C. The individual replenished" in watches[0].ask
    assert sb(shared_data, tmp_path, "real", "official", always_silent)[0].cases["total"] == (0, 2500)
    assert {w.start for w in sb(shared_data, tmp_path, "real", "streaming", always_silent, context=0)[1]} == {0}


def test_sequential_questions_hold_the_right_answers_before(shared_data, tmp_path):
    _, watches = sb(shared_data, tmp_path, "sqa", "official", always_silent)
    assert "At timestamp" not in watches[0].ask and watches[2].ask.count("At timestamp") == 2
    assert "Options: A. Wang chuqin., B. Fan Z.D., C. Xu xin., D. Ma Lin.; Answer: A; " in watches[1].ask


def test_output_on_cue_is_polled_until_the_first_yes(shared_data, tmp_path):
    path = shared_data / "annotations/streamingbench/questions_proactive.json"
    question = json.loads(path.read_text())[0]["questions"][0]  # asked at 20 s, to be said at 29 s

    def says(watch):
        return [Said(watch.until - 1, ("Yes." if watch.until >= 28 else "no") if "yes or no" in watch.ask else "3")]

    exam = run_streamingbench.exam(path, "official")
    reply = exam.predictions(answers_of(exam, says))[0]["questions"][0]["jstream"]
    times = [turn["time"] for turn in reply["dialog_history"] if turn["role"] == "assistant"]
    assert reply["answered"] == 28 and times == [*range(21, 29), 28]
    assert reply["dialog_history"][-1]["content"] == "3" == question["ground_truth_output"]
    found, watches = sb(shared_data, tmp_path, "proactive", "official", always_silent)
    assert found.metrics == {"total time": 0, "total answer": 0} and watches[12].until == 29 + 4
    assert {watch.start for watch in watches[:13]} == {20}


def test_output_on_cue_comes_by_the_models_own_decision(shared_data, tmp_path):
    path = shared_data / "annotations/streamingbench/questions_proactive.json"
    questions = [question for entry in json.loads(path.read_text()) for question in entry["questions"]]
    by_words = collections.defaultdict(list)
    for question in questions:
        by_words[question["question"]].append(question)

    def knows(watch):
        question = by_words[watch.ask].pop(0)
        return [Said(watch.until - run_streamingbench.LATE - 1, f"It is {question['ground_truth_output']}")]

    found, watches = sb(shared_data, tmp_path, "proactive", "streaming", knows)
    assert found.metrics == {"total time": 100, "total answer": 100}
    assert not any(watch.forced for watch in watches) and watches[0].at == 20 and watches[0].until == 33
    assert sb(shared_data, tmp_path, "proactive", "streaming", always_silent)[0].cases["total time"] == (0, 250)


# ------------------------------------------------------------------------------------------------------------- progress


def test_a_line_that_was_cut_is_dropped_and_the_file_goes_on(tmp_path):
    path = tmp_path / "progress.jsonl"
    with Progress(path, {"fps": 1.0}) as progress:
        progress.add("a", {"answer": ["Yes"]})
        progress.add("b", {"answer": None, "failure": "no video"})
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with Progress(path, {"fps": 1.0}) as progress:
            assert list(progress.done) == ["a", "b"][: max(whole[:cut].count(b"\n") - 1, 0)]
            progress.add("c", {"answer": "é\ud800"})
        with Progress(path, {"fps": 1.0}) as progress:
            assert progress.done["c"]["answer"] == "é\ud800"
    assert Progress(path, {"fps": 1.0}).failures() == {}
    path.write_bytes(whole)
    assert Progress(path, {"fps": 1.0}).failures() == {"b": "no video"}
    with pytest.raises(ConfigError, match="expected a run with fps 2.0, found one with 1.0; take another --out"):
        Progress(path, {"fps": 2.0})
    path.write_bytes(whole + b"no json\n")
    with pytest.raises(DialogueError, match="line 4"):
        Progress(path, {"fps": 1.0})


def test_a_contest_goes_on_with_what_is_left_and_tries_again_what_failed(world, tmp_path, monkeypatch):
    """With a script for an engine: kept answers are not asked again, and no model is opened where none is needed."""
    engines, loads = [], []

    def engine(contest_, memory, group):
        engines.append(sorted(group.questions))
        return Script(2, lambda *_: f"by {memory}")

    model = types.SimpleNamespace(config=types.SimpleNamespace(vision="tower"))
    model.for_frames = lambda *_: model
    monkeypatch.setattr(contest, "_engine", engine)
    videos, annotations = tmp_path / "videos", world / "ovo.json"
    videos.mkdir()
    (videos / "000000.mp4").symlink_to(world / "videos/000000.mp4")

    def hold(memory="sinks"):
        exam = run_ovo.exam(annotations, "official")
        one = contest.Contest(
            exam, annotations, lambda path: ovo_bench.score(annotations, path), videos, tmp_path / "out", {"seed": 0},
            lambda: loads.append(1) or model,
        )  # fmt: skip
        return contest.hold(one, memory, ["last_frames:4", "always_silent"])

    found = hold()
    assert list(found) == ["model", "last_frames:4", "always_silent"] and len(loads) == 1
    assert "questions that failed, world/000001.mp4: its video is missing: 6 (10, 30, 50, …)" in found["model"].notes
    (videos / "000001.mp4").symlink_to(world / "videos/000001.mp4")
    again = hold()
    assert len(engines[0]) == len(engines[2]) == 6 and not set(engines[0]) & set(engines[2])
    assert not any("missing" in line for line in again["model"].notes) and len(loads) == 2
    report = (tmp_path / "out/report.json").read_bytes()
    hold()
    assert len(loads) == 2 and len(engines) == 4 and (tmp_path / "out/report.json").read_bytes() == report
    said = json.loads((tmp_path / "out/last_frames-4/predictions.json").read_text())["backward"][0]["response"]
    assert said == "by last_frames:4"
    with pytest.raises(ConfigError, match="memory 'append', found one with 'sinks'"):
        hold("append")
    with pytest.raises(ConfigError, match="found 'lots'"):
        hold("lots")
    with pytest.raises(ConfigError, match="is no baseline"):
        hold("last_frames:4")


def test_a_question_that_asks_nothing_is_answered(world):
    def begin():
        return "nothing"
        yield

    exam = Exam({"q": Question(VIDEO, begin)}, {}, dict)
    assert answer(Script(1), exam.questions, world / "videos")[0] == {"q": ("nothing", None, False)}
    assert answers_of(exam, always_silent) == {"q": "nothing"}


WRONG = (
    ({"benchmark": "coin"}, r"videos: expected --benchmark=ovo_bench|streamingbench, found coin"),
    ({"benchmark": "ovo_bench", "annotations": None}, "expected --annotations=FILE and --out=FOLDER"),
    ({"benchmark": "ovo_bench", "predictions": "p.json"}, "no --predictions"),
    ({"benchmark": "ovo_bench", "tolerance": 2.0}, "tolerance: expected no such flag for ovo_bench"),
    ({"benchmark": "ovo_bench", "baseline": ["loud"]}, "found 'loud'"),
    ({"benchmark": "ovo_bench", "context": 3.0}, "context: expected no such flag for ovo_bench"),
)
# In a process of its own: two commands in one would define the same flags twice.
TELL = """
import json, sys
from absl import flags
from absl.testing import flagsaver
from jstream import evaluate
from jstream.config import ConfigError
flags.FLAGS(["evaluate"])
for given in json.loads(sys.argv[1]):
    with flagsaver.flagsaver(**given):
        try:
            evaluate.main()
        except ConfigError as error:
            print(error)
"""


def test_flags_that_do_not_fit_are_told_in_a_line(world, tmp_path):
    set_ = {"annotations": str(world / "ovo.json"), "out": str(tmp_path / "o"), "videos": str(world / "videos")}
    given = json.dumps([{**set_, **wrong} for wrong, _ in WRONG])
    done = subprocess.run([sys.executable, "-c", TELL, given], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(WRONG), done.stderr
    for line, (_, said) in zip(lines, WRONG):
        assert said in line
