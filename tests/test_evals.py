"""Evaluation: every measure on cases worked by hand, and the world benchmark played by scripts instead of a model."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from jstream.config import ConfigError, ProtocolConfig
from jstream.data import world as worlds
from jstream.data.dialogue import interval_iou, read_raw
from jstream.evals import world as bench
from jstream.evals.metrics import Reply, bootstrap, f1, match_replies, ratio
from jstream.protocols import make_tokenizer
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY, STATES, Turn
from jstream.protocols.streamo import Streamo, turns_of
from jstream.streaming.event import Event

WORLD = worlds.make_world(5, 0)
SAMPLES = bench.make_samples(5, 3)
ERRORS = {"false_responses_per_minute", "timing_error_seconds"}  # 0 is best


def event(time, text=None, state=None):
    state = state or ("response" if text else "silence")
    return Event(float(time), state, {name: float(name == state) for name in STATES}, text)


def played(task, seconds, queries, expected, said):
    """A dialogue of so many turns: texts by the frame they are said in."""
    state = lambda i: RESPONSE if i in expected else SILENCE
    turns = [Turn(float(i), i + 1.0, queries.get(i), state(i), expected.get(i)) for i in range(seconds)]
    return bench.Played(bench.Sample(WORLD, task, tuple(turns)), tuple(event(i, said.get(i)) for i in range(seconds)))


def metrics_of(*dialogues):
    return bench.score(dialogues)["metrics"]


class Script:
    """A session that says what it is told to: one list of events for each dialogue."""

    def __init__(self, scripts):
        self.scripts, self.events, self.heard = iter(scripts), iter(()), []

    def reset(self):
        self.events = iter(next(self.scripts))
        self.heard.append("reset")

    def ask(self, text):
        self.heard.append(text)

    def see(self, frame):
        self.heard.append(frame.time)
        return next(self.events)


def perfect(samples):
    return Script([[event(t.start, t.reply, STATES[t.state]) for t in sample.turns] for sample in samples])


def silent(samples):
    return Script([[event(turn.start) for turn in sample.turns] for sample in samples])


# ------------------------------------------------------------------------------------------------- the pieces


def test_matching_finds_as_many_pairs_as_there_are():
    at = lambda *times: [Reply(t, "") for t in times]
    assert match_replies(at(2, 3), at(1, 2)) == [(0, 0), (1, 1)]  # the nearest first would leave 3 and 1 alone
    assert match_replies(at(5), at(4, 5, 6)) == [(0, 1)]  # the nearest, where one is enough
    assert match_replies(at(5, 5), at(5)) in ([(0, 0)], [(1, 0)])  # one to one
    assert match_replies(at(7), at(5)) == []
    assert match_replies(at(7), at(5), tolerance=2) == [(0, 0)]
    assert match_replies(at(0.3), at(0.1 + 0.2 + 1)) == [(0, 0)]  # inclusive, whatever the rounding
    assert match_replies([], at(1)) == match_replies(at(1), []) == []
    assert match_replies(at(9, 2), at(2, 9)) == [(0, 1), (1, 0)]  # in any order


def test_exact_matching_needs_the_same_text_and_may_cross_in_time():
    predicted, reference = [Reply(5, "B"), Reply(6, " A ")], [Reply(5, "A"), Reply(6, "B")]
    assert match_replies(predicted, reference, exact=True) == [(0, 1), (1, 0)]
    assert match_replies([Reply(5, "a")], reference, exact=True) == []


def test_matching_agrees_with_trying_every_matching():
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(150):
        draw = lambda: [Reply(float(rng.integers(8)), "AB"[rng.integers(2)]) for _ in range(rng.integers(5))]
        predicted, reference, exact = draw(), draw(), bool(rng.integers(2))
        best = (0, 0.0)
        for order in itertools.permutations([*range(len(reference)), *[None] * len(predicted)], len(predicted)):
            pairs = [(p, reference[j]) for p, j in zip(predicted, order) if j is not None]
            if all(abs(p.time - r.time) <= 1 and (p.text == r.text or not exact) for p, r in pairs):
                best = max(best, (len(pairs), -sum(abs(p.time - r.time) for p, r in pairs)))
        found = match_replies(predicted, reference, exact=exact)
        assert (len(found), -sum(abs(predicted[i].time - reference[j].time) for i, j in found)) == best


def test_ratios_without_cases_are_none():
    assert ratio(0, 0) is None and ratio(1, 4) == 0.25
    assert f1(0, 0, 0) is None and f1(0, 3, 0) == 0 and f1(2, 3, 4) == pytest.approx(4 / 7)


def test_iou_of_intervals():
    assert interval_iou((2, 5), (2, 5)) == 1
    assert interval_iou((2, 5), (3, 6)) == 2 / 4
    assert interval_iou((0, 10), (4, 5)) == 1 / 10
    assert interval_iou((2, 5), (5, 6)) == 0  # they only touch
    assert interval_iou((5, 2), (2, 5)) == interval_iou((3, 3), (3, 3)) == 0  # reversed, empty


def test_a_bootstrap_interval_holds_the_value_and_repeats():
    rng = np.random.Generator(np.random.PCG64(1))
    denominators = rng.integers(1, 9, 60)
    numerators = rng.binomial(denominators, 0.7)
    low, high = bootstrap(numerators, denominators)
    assert low < numerators.sum() / denominators.sum() < high and high - low < 0.3
    assert bootstrap(numerators, denominators) == (low, high) != bootstrap(numerators, denominators, seed=1)
    # Of a mean: 1.96 standard errors to either side, about.
    values = rng.normal(3, 2, 400)
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 20, rel=0.15)


def test_a_bootstrap_without_variation_or_cases():
    assert bootstrap([2, 3], [2, 3]) == (1, 1)
    assert bootstrap([0, 5], [0, 5]) == (1, 1)  # draws of the first alone have no cases
    assert bootstrap([0, 0], [0, 0]) is None and bootstrap([]) is None


# ------------------------------------------------------------------------------------------------- the metrics


def test_states_by_hand():
    turns = [Turn(float(i), i + 1.0, None, state) for i, state in enumerate([SILENCE, STANDBY, STANDBY, RESPONSE])]
    events = [event(0), event(1), event(2, None, "standby"), event(3, "Yes.")]
    found = metrics_of(bench.Played(bench.Sample(WORLD, "event_caption", tuple(turns)), tuple(events)))
    assert found["state_accuracy"] == 3 / 4
    assert (found["silence_recall"], found["standby_recall"], found["response_recall"]) == (1, 1 / 2, 1)
    assert (found["silence_precision"], found["standby_precision"], found["response_precision"]) == (1 / 2, 1, 1)


def test_narration_by_hand():
    expected = {2: "A.", 5: "B.", 9: "C."}
    said = {3: "A.", 5: "C.", 9: "C.", 14: "D."}
    found = metrics_of(played("narration", 20, {0: "Narrate."}, expected, said))
    assert found["narration_timing_f1"] == pytest.approx(2 * 3 / (4 + 3), abs=1e-6)  # 3–2, 5–5, 9–9
    assert found["narration_f1"] == pytest.approx(2 * 2 / (4 + 3), abs=1e-6)  # without 5–5
    assert found["narration_exact"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["timing_error_seconds"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["false_responses_per_minute"] == pytest.approx(3)  # "D." in 20 s
    assert found["caption_exact"] is None and found["tsqa_accuracy"] is None and found["forward_miou"] is None


def test_f1_is_pooled_over_dialogues():
    right = played("narration", 9, {}, {2: "A."}, {2: "A."})
    wrong = played("narration", 9, {}, {2: "A.", 4: "B.", 7: "C."}, {})
    assert metrics_of(right, wrong)["narration_f1"] == pytest.approx(2 * 1 / (1 + 4))  # not (1 + 0) / 2


def test_captions_by_hand():
    expected, said = {3: "A.", 6: "B.", 9: "C.", 12: "D."}, {3: "A.", 7: "B.", 11: "C.", 12: "E."}
    for task, name in (("event_caption", "caption_exact"), ("action_caption", "action_caption_exact")):
        found = metrics_of(played(task, 20, {0: "Caption."}, expected, said))
        assert found[name] == 2 / 4  # C. comes 2 s late, E. is wrong
        assert found["narration_exact"] is None


def test_answers_and_their_updates_by_hand():
    queries = {3: "Which colour?", 10: "Where?"}
    expected = {3: "Red.", 8: "Blue.", 10: "Top.", 13: "Green."}
    found = metrics_of(played("tsqa", 20, queries, expected, {3: "Red.", 9: "Blue.", 10: "Left.", 15: "Green."}))
    assert found["tsqa_accuracy"] == 1 / 2 and found["tsqa_update_accuracy"] == 1 / 2
    # An answer one turn late is none; what is said in the turn of a question is no update.
    expected = {3: "Red.", 8: "Blue.", 9: "Top."}
    found = metrics_of(played("tsqa", 20, {3: "Which colour?", 9: "Where?"}, expected, {4: "Red.", 9: "Blue."}))
    assert found["tsqa_accuracy"] == 0 and found["tsqa_update_accuracy"] == 0


def test_a_count_is_right_where_it_stands_in_time():
    queries, expected = {2: "How many?", 14: "Which colour?"}, {2: "1.", 6: "2.", 9: "3.", 14: "Red.", 17: "4."}
    found = lambda said: metrics_of(played("tsqa", 20, queries, expected, said))["count_accuracy"]
    assert found({2: "1.", 6: "2.", 9: "3.", 14: "Red.", 17: "4."}) == 1
    assert found({3: "1.", 8: "2.", 9: "3.", 17: "Red."}) == 2 / 4  # 2. is two seconds late, 4. is not said
    assert found({2: "1.", 5: "2.", 10: "3.", 17: "4"}) == 3 / 4  # told early it stands all the same; "4" is not "4."
    assert found({2: "1.", 6: "2.", 7: "7.", 9: "3.", 17: "4."}) == 3 / 4  # only the last number counts
    assert found({}) == 0
    assert metrics_of(played("tsqa", 9, {1: "Which colour?"}, {1: "Red."}, {}))["count_accuracy"] is None


def test_an_answer_that_shares_its_turn_is_compared_with_all_that_is_said_there():
    queries, expected = {0: "Narrate.", 4: "How many?"}, {2: "A.", 4: "B. 2."}
    answered = lambda text: metrics_of(played("mixed", 9, queries, expected, {4: text}))["tsqa_accuracy"]
    assert answered("B. 2.") == 1 and answered("2.") == 0
    assert metrics_of(played("mixed", 9, queries, expected, {}))["tsqa_update_accuracy"] is None


def test_forward_grounding_by_hand():
    queries = {0: "When?", 10: "When?", 20: "When?", 29: "When?"}
    expected = {5: "From 3s to 5s.", 16: "From 12s to 16s.", 25: "From 22s to 25s."}
    found = metrics_of(played("forward_grounding", 30, queries, expected, {5: "From 4s to 6s.", 26: "Soon."}))
    # [2, 5) and [3, 6) share 2 s of 4; nothing is said; no span. The last query has no reference, so it is not counted.
    assert found["forward_miou"] == pytest.approx((2 / 4 + 0 + 0) / 3, abs=1e-6)
    assert found["forward_timing"] == pytest.approx(2 / 3, abs=1e-6)
    assert found["backward_miou"] is None
    # The first reply counts, though a later one is better.
    early = metrics_of(
        played("forward_grounding", 9, {0: "?"}, {5: "From 3s to 5s."}, {2: "From 1s to 2s.", 5: "From 3s to 5s."})
    )
    assert early["forward_miou"] == 0 and early["forward_timing"] == 0


def test_backward_grounding_by_hand():
    span = "From 2s to 4s."
    queries = {10: "When?", 20: "When?", 25: "When?", 26: "When?"}
    said = {12: span, 23: span, 26: span}
    found = metrics_of(played("backward_grounding", 30, queries, dict.fromkeys(queries, span), said))
    # 2 turns late is in time; 3 are not; the reply in turn 26 answers the question of turn 26, not that of 25.
    assert found["backward_miou"] == (1 + 0 + 0 + 1) / 4


# ------------------------------------------------------------------------------------------------- the benchmark


def test_a_perfect_script_scores_one_everywhere(tmp_path):
    report = bench.evaluate(perfect(SAMPLES), SAMPLES, tmp_path, {"benchmark": "world"}, 16, rendered=True)
    assert report["metrics"] == {name: 0 if name in ERRORS else 1 for name in bench.METRICS}
    assert all(ends == [report["metrics"][name]] * 2 for name, ends in report["intervals"].items())
    assert set(report["rules"]) == set(report["counts"]["cases"]) == set(bench.METRICS)
    assert set(report["counts"]["dialogues"]) == set(bench.TASKS)


def test_silence_scores_nothing_but_silence(tmp_path):
    found = bench.evaluate(silent(SAMPLES), SAMPLES, tmp_path, {}, 16, rendered=True)["metrics"]
    states = [turn.state for sample in SAMPLES for turn in sample.turns]
    assert found.pop("state_accuracy") == pytest.approx(states.count(SILENCE) / len(states), abs=1e-6)
    assert found.pop("silence_precision") == pytest.approx(states.count(SILENCE) / len(states), abs=1e-6)
    assert found.pop("silence_recall") == 1
    undefined = {"standby_precision", "response_precision", "timing_error_seconds"}
    assert found == {name: None if name in undefined else 0 for name in found}


def test_the_files_say_what_happened(tmp_path):
    about = {"benchmark": "world", "seed": 5, "num_videos": 3, "checkpoint": "bundled"}
    report = bench.evaluate(perfect(SAMPLES), SAMPLES, tmp_path, about, 16, rendered=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(bench.FILES)
    assert json.loads((tmp_path / "report.json").read_text()) == report and about.items() <= report.items()
    text = (tmp_path / "report.md").read_text()
    assert all(f"`{name}`: {metric.rule}" in text for name, metric in bench.METRICS.items())
    assert bench.table(report) in text
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["task"], line["seed"], line["index"]) for line in lines] == [
        (sample.task, 5, sample.world.index) for sample in SAMPLES
    ]
    for line, sample in zip(lines, SAMPLES):
        assert line["events"] == line["references"] and len(line["events"]) == sample.world.duration
        queries = [(turn.start, turn.query) for turn in sample.turns if turn.query]
        assert [(query["time"], query["text"]) for query in line["queries"]] == queries


def test_files_appear_whole_or_not_at_all(tmp_path):
    class Broken(Script):
        def see(self, frame):
            if len(self.heard) > 30:
                assert (tmp_path / "predictions.jsonl.partial").exists()
                raise KeyboardInterrupt
            return super().see(frame)

    broken = lambda: Broken([[event(turn.start) for turn in sample.turns] for sample in SAMPLES])
    with pytest.raises(KeyboardInterrupt):
        bench.evaluate(broken(), SAMPLES, tmp_path, {}, 16, rendered=True)
    assert list(tmp_path.iterdir()) == []
    bench.evaluate(perfect(SAMPLES), SAMPLES, tmp_path, {}, 16, rendered=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        bench.evaluate(broken(), SAMPLES, tmp_path, {}, 16, rendered=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_question_is_asked_before_the_frame_of_its_turn():
    turns = [Turn(0.0, 1.0), Turn(1.0, 2.0, "Now?"), Turn(2.0, 3.0)]
    session = Script([[event(i) for i in range(3)]])
    events = bench.play(session, bench.frames_of(WORLD, 16, rendered=True)[:3], turns)
    assert session.heard == ["reset", 0.0, "Now?", 1.0, 2.0]
    assert [e.time for e in events] == [0, 1, 2]


def test_frames_come_through_a_video_one_a_second():
    world = min((worlds.make_world(5, index) for index in range(8)), key=lambda world: world.duration)
    filmed, rendered = bench.frames_of(world, 31), bench.frames_of(world, 31, rendered=True)
    assert [frame.time for frame in filmed] == [frame.time for frame in rendered] == list(range(world.duration))
    assert filmed[0].image.shape == rendered[0].image.shape == (32, 32, 3)  # H.264 needs an even side
    for a, b in zip(filmed, rendered):
        assert 0 < np.abs(a.image.astype(int) - b.image).mean() < 16  # the same picture, but compressed


def test_the_dialogues_are_those_that_the_world_writes(tmp_path):
    worlds.write_worlds(tmp_path, 1, seed=5, size=16, fps=1)
    written = [(d.task, tuple(turns_of(d, int(d.duration)))) for d in read_raw(tmp_path / "dialogues.jsonl")]
    assert [(sample.task, sample.turns) for sample in bench.make_samples(5, 1)] == written


def test_one_task_has_the_same_dialogues_alone_as_among_all():
    assert bench.make_samples(5, 3, ["tsqa"]) == [sample for sample in SAMPLES if sample.task == "tsqa"]


def test_a_cache_of_the_stated_capacity_holds_every_sample():
    queries = [turn.query for sample in SAMPLES for turn in sample.turns if turn.query]
    config = ProtocolConfig()
    protocol = Streamo(config, make_tokenizer(config, queries, 512), tokens_per_frame=9)
    # As a model that answers 4 tokens in every turn would fill it.
    longest = 0
    for sample in SAMPLES:
        tokens = len(protocol.prefix)
        for turn in sample.turns:
            tokens += len(protocol.open_turn(turn)) + len(protocol.close_turn(RESPONSE, [0] * 4))
        longest = max(longest, tokens)
    assert longest < bench.room_for(SAMPLES, protocol, 4) < 1.3 * longest + 300


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((5, 1, ["naration"]), "narration, event_caption"), ((5, 0), "num_videos"), ((-1, 1), "seed")],
)
def test_what_cannot_be_evaluated_is_a_clear_error(arguments, said):
    with pytest.raises(ConfigError, match=said):
        bench.make_samples(*arguments)


def test_an_unknown_task_is_one_line(tmp_path):
    flags = ["--benchmark=world", "--seed=5", f"--out={tmp_path / 'out'}", "--task=naration"]
    done = subprocess.run([sys.executable, "-m", "jstream.evaluate", *flags], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: task: expected one of narration, ") and done.stderr.count("\n") == 1
    assert "'naration'" in done.stderr and not (tmp_path / "out").exists()
