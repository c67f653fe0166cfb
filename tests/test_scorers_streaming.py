"""Scorers of streams: StreamingBench, timing-aware F1 and Streamo-Bench, on cases worked by hand."""

import copy
import itertools
import json

import numpy as np
import pytest

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals import streamingbench, streamo_bench, timing
from jstream.evals.metrics import Reply


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------- StreamingBench


@pytest.fixture
def answered(shared_data, tmp_path):
    """Scores replies to the real questions of a file, made from each question by a function; `...` is none."""

    def score(name, reply, **options):
        annotations = shared_data / f"annotations/streamingbench/questions_{name}.json"
        content = json.loads(annotations.read_text())
        entries = [entry for item in content for entry in (item if isinstance(item, list) else [item])]
        questions = [question for entry in entries for question in entry["questions"]]
        for i, question in enumerate(questions):
            if (said := reply(i, question)) is not ...:
                question["Model-7B"] = said
        return streamingbench.score(annotations, write(tmp_path / "p.json", content), **options)

    return score


@pytest.mark.parametrize(("name", "count"), [("real", 2500), ("omni", 1500), ("sqa", 250)])
def test_right_answers_to_the_published_questions_score_100(answered, name, count):
    found = answered(name, lambda i, question: question["answer"] + ".")
    assert set(found.metrics.values()) == {100} and found.cases["total"] == (count, count) and found.notes == ()
    assert sum(cases for task, (_, cases) in found.cases.items() if task != "total") == count


def test_a_leading_blank_is_wrong_unless_stripped(answered):
    blank = lambda i, question: " " * (i % 2) + question["answer"]
    assert answered("real", blank).metrics["total"] == 50
    assert answered("real", blank, variants=["stripped"]).metrics["total"] == 100
    assert answered("real", lambda i, question: question["answer"].lower()).metrics["total"] == 0
    assert answered("real", lambda i, question: f"The answer is {question['answer']}").metrics["total"] == 0


def test_a_missing_reply_is_wrong_or_left_out(answered):
    some = lambda i, question: [question["answer"], "", None, ...][i % 4]
    found = answered("omni", some)
    assert found.cases["total"] == (375, 1500)
    assert found.notes[-1].startswith("questions without a reply: 1125 (sample_")
    assert answered("omni", some, variants=["skip_missing"]).cases["total"] == (375, 375)


def test_output_on_cue_is_judged_by_its_last_time_and_words(answered):
    def on_cue(late, said):
        def reply(i, question):
            hours, minutes, seconds = map(int, question["ground_truth_time_stamp"].split(":"))
            time = 3600 * hours + 60 * minutes + seconds + late
            asked = {"role": "user", "content": question["question"], "time": 0}
            return {"answered": time, "dialog_history": [asked, {"content": said(question), "time": time}]}

        return reply

    gold = lambda question: f"It is {question['ground_truth_output']}!"
    assert answered("proactive", on_cue(2, gold)).metrics == {"total time": 100, "total answer": 100}
    assert answered("proactive", on_cue(-2, lambda _: "")).metrics == {"total time": 100, "total answer": 0}
    assert answered("proactive", on_cue(3, gold)).metrics == {"total time": 0, "total answer": 0}
    wider = answered("proactive", on_cue(3, gold), tolerance=3.0)
    assert wider.metrics["total answer"] == 100 and "within 3 s" in wider.rules["output on cue"]
    empty = answered("proactive", lambda i, question: {"answered": False, "dialog_history": []})
    assert empty.cases["total time"] == (0, 250)


ENTRY = {
    "video_path": "./videos/a.mp4",
    "questions": [{"task_type": "Counting", "question": "How many?", "time_stamp": "0:01:02", "answer": "C"}],
}


def streaming(tmp_path, change, annotations=(ENTRY,), **options):
    predicted = copy.deepcopy(list(annotations))
    change(predicted)
    return streamingbench.score(
        write(tmp_path / "a.json", list(annotations)), write(tmp_path / "p.json", predicted), **options
    )


def test_two_questions_of_the_same_words_keep_their_order(tmp_path):
    def change(predicted):
        predicted[0]["questions"][0]["M"], predicted[1]["questions"][0]["M"] = "C", "A"

    other = copy.deepcopy(ENTRY)
    other["questions"][0]["answer"] = "A"
    assert streaming(tmp_path, change, (ENTRY, other)).cases["total"] == (2, 2)


def test_a_reply_to_an_unknown_question_is_told_of(tmp_path):
    def change(predicted):
        predicted[0]["questions"].append(dict(predicted[0]["questions"][0], question="Why?", M="C"))
        predicted[0]["questions"][0]["M"] = "C"

    found = streaming(tmp_path, change)
    assert found.cases["total"] == (1, 1)
    assert found.notes == ("replies left out, as the annotations lack their question: 1 (a.mp4 at 0:01:02)",)


def test_of_several_models_one_has_to_be_named(tmp_path):
    change = lambda predicted: predicted[0]["questions"][0].update(A="A", C="C")
    for model, said in ((None, r"\(A, C\), found None"), ("B", r"\(A, C\), found B")):
        with pytest.raises(ConfigError, match=said):
            streaming(tmp_path, change, model=model)
    assert streaming(tmp_path, change, model="C").metrics["total"] == 100
    with pytest.raises(ConfigError, match=r"\(none\), found None"):
        streaming(tmp_path, lambda _: None)


CUE = {
    "task_type": "P",
    "question": "When?",
    "time_stamp": "1",
    "ground_truth_time_stamp": "0:09",
    "ground_truth_output": "3",
}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"video_path": 3}, "record 0: expected text under 'video_path', found 3"),
        ({"questions": None}, "record 0: expected a list under 'questions', found None"),
        ({"questions": [{"time_stamp": "1"}]}, "record 0: expected text under 'question', found None"),
        ({"questions": [CUE | {"M": "3"}]}, "a.mp4 at 1: expected an object, found '3'"),
        ({"questions": [CUE | {"M": {"dialog_history": [{"time": "9"}]}}]}, "a.mp4 at 1: expected a number, found '9'"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, entry, said):
    with pytest.raises(DialogueError, match=said) as caught:
        streaming(tmp_path, lambda predicted: predicted[0].update(entry), (ENTRY | {"questions": [CUE]},))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------ timing-aware F1


def lines(path, *content):
    path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    return path


def timed(name, *replies, **more):
    return {"id": name, "responses": [{"time": time, "text": text} for time, text in replies], **more}


def timing_of(tmp_path, references, predictions, **options):
    return timing.score(lines(tmp_path / "a", *references), lines(tmp_path / "p", *predictions), **options)


def test_a_reply_is_worth_less_the_farther_it_is_from_when_it_was_due(tmp_path):
    references = [timed(1, (10, "A."), (20, "B"), task="x"), timed(2, (5, "C"), task="y")]
    found = timing_of(tmp_path, references, [timed(1, (11, " a "), (20, "C"), (29, "B")), timed(2)])
    worth = 1 - 1 / 3  # of the A alone: C is no reference there, and the B is more than 3 s late
    assert found.metrics["precision"] == pytest.approx(100 * worth / 3)
    assert found.metrics["recall"] == pytest.approx(100 * worth / 3)
    assert found.metrics["total"] == pytest.approx(100 * 2 * worth / 6)
    assert found.metrics["x"] == pytest.approx(100 * 2 * worth / 5) and found.metrics["y"] == 0
    any_text = timing_of(tmp_path, references, [timed(1, (11, "?"), (20, "C"))], variants=["any_text"])
    assert any_text.metrics["precision"] == pytest.approx(100 * (worth + 1) / 2)
    wide = timing_of(tmp_path, references, [timed(1, (11, "A"))], tolerance=10.0)
    assert wide.metrics["precision"] == pytest.approx(90) and "τ = 10 s" in wide.rules["worth"]


def test_the_matching_is_the_one_of_most_worth():
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(200):
        draw = lambda: [Reply(float(rng.integers(16)) / 2, "AB"[rng.integers(2)]) for _ in range(rng.integers(5))]
        predicted, reference = draw(), draw()
        best = 0.0
        for order in itertools.permutations([*reference, *[None] * len(predicted)], len(predicted)):
            pairs = [(p, r) for p, r in zip(predicted, order) if r is not None and p.text == r.text]
            best = max(best, sum(max(0, 1 - abs(p.time - r.time) / 2) for p, r in pairs))
        assert timing.worth(predicted, reference, 2) == pytest.approx(best)


def test_silence_has_no_precision_and_no_recall(tmp_path):
    found = timing_of(tmp_path, [timed(1, (1, "A"))], []).metrics
    assert found == {"total": 0, "precision": None, "recall": 0}


# -------------------------------------------------------------------------------------------------------- Streamo-Bench


def streamo_of(tmp_path, references, predictions, **options):
    return streamo_bench.score(lines(tmp_path / "a", *references), lines(tmp_path / "p", *predictions), **options)


def test_accuracy_is_over_replies_and_recall_over_questions(tmp_path):
    references = [timed(1, (4, "Two."), (9, "Three."), task="tsqa"), timed(2, (1, "Red"), task="tsqa")]
    predictions = [timed(1, (7, "two"), (7, "two"), (12.1, "Three."), (9, "Four")), timed(2, (1, "It is red."))]
    found = streamo_of(tmp_path, references, predictions)
    assert found.cases["tsqa accuracy"] == (1, 5)  # one "two", in time by the skin of its teeth
    assert found.metrics["tsqa recall"] == pytest.approx(100 * (1 / 2 + 0) / 2)
    assert found.metrics["forward_grounding mIoU"] is None
    found = streamo_of(tmp_path, references, predictions, variants=["contains"], tolerance=4.0)
    assert found.cases["tsqa accuracy"] == (3, 5) and found.metrics["tsqa recall"] == 100
    assert "4 s away" in found.rules["right"]


def test_a_reply_that_contains_several_answers_says_the_longest(tmp_path):
    references = [timed(1, (1, "red"), (2, "dark red"), (3, "1"), task="tsqa")]
    score = lambda text: streamo_of(tmp_path, references, [timed(1, (2, text))], variants=["contains"]).cases
    assert score("It is dark  RED now.")["tsqa accuracy"] == (1, 1)
    assert score("reddish")["tsqa accuracy"] == score("12")["tsqa accuracy"] == (0, 1)  # whole words


def test_grounding_is_the_mean_iou(tmp_path):
    forward, backward = dict(task="forward_grounding"), dict(task="backward_grounding")
    references = [{"id": i, "span": [2, 6], **(forward if i < 3 else backward)} for i in range(4)]
    predictions = [{"id": 0, "span": [4, 8]}, {"id": 1, "span": None}, {"id": 3, "span": [2, 6]}]
    found = streamo_of(tmp_path, references, predictions)
    assert found.metrics["forward_grounding mIoU"] == pytest.approx(100 * (2 / 6) / 3)
    assert found.metrics["backward_grounding mIoU"] == 100
    assert found.notes == ("questions without a record: 1 (2)",)


@pytest.mark.parametrize(
    ("reference", "prediction", "said"),
    [
        ({"task": "narration"}, {}, "a, line 1: expected a task of tsqa, forward_grounding, backward_grounding, found"),
        ({"task": "tsqa"}, {}, "a, line 1: expected a list under 'responses', found None"),
        (
            timed(1, task="tsqa"),
            {"responses": [{"time": -1e400, "text": ""}]},
            "p, line 1: expected a number, found -inf",
        ),
        (timed(1, task="tsqa"), {"responses": [{"time": 1}]}, "p, line 1: expected text under 'text', found None"),
        (timed(1, task="tsqa"), timed(1, *[(1, "")] * 1001), "p, line 1: expected at most 1000 responses, found 1001"),
        ({"task": "forward_grounding"}, {}, "a, line 1: expected a list of 2 numbers, found None"),
        (
            {"task": "forward_grounding", "span": [1, 2]},
            {"span": [1]},
            r"p, line 1: expected a list of 2 numbers, found \[1\]",
        ),
    ],
)
def test_records_of_streams_that_do_not_fit_are_one_line(tmp_path, reference, prediction, said):
    with pytest.raises(DialogueError, match=said):
        streamo_of(tmp_path, [{"id": 1} | reference], [{"id": 1} | prediction])


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_is_in_seconds(tmp_path, tolerance):
    for of in (timing_of, streamo_of):
        with pytest.raises(ConfigError, match="tolerance: expected seconds"):
            of(tmp_path, [], [], tolerance=tolerance)
