"""Scorers of streams: StreamingBench."""

import copy
import json

import pytest

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals import streamingbench


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
    assert found.notes[-1].startswith("1125 questions without a reply: sample_")
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
    assert found.notes == ("1 replies left out: the annotations lack their question: a.mp4 at 0:01:02",)


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
