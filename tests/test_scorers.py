"""Scorers of predictions: OVO-Bench against its published numbers, what a report says, and the command without JAX."""

import json
import pathlib
import re
import subprocess
import sys

import pytest

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals import ovo_bench, records, report
from jstream.evals.scorers import SCORERS

PACKAGE = pathlib.Path(records.__file__).parent.parent
WITHOUT_JAX = (
    "import runpy, sys; sys.modules['jax'] = sys.modules['flax'] = None; "
    "runpy.run_module('jstream.evaluate', run_name='__main__', alter_sys=True)"
)


def evaluate(*arguments):
    command = [sys.executable, "-c", WITHOUT_JAX, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def write(path, content):
    """A file with text, with bytes, or with anything else as JSON."""
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---------------------------------------------------------------------------------------------- OVO-Bench, as published


@pytest.fixture(scope="session")
def ovo(shared_data):
    annotations = shared_data / "annotations/ovo_bench/ovo_bench_new.json"
    results = shared_data / "evaluators/ovo_official/results"
    return lambda model, *variants: ovo_bench.score(annotations, results / model, variants)


@pytest.fixture(scope="session")
def expected(shared_data):
    return json.loads((shared_data / "evaluators/EXPECTED.json").read_text())["ovo_official"]


@pytest.mark.parametrize(("model", "total"), [("Gemini", 63.00), ("InternVL2", 50.15), ("FlashVStream", 33.61)])
def test_published_predictions_of_ovo_bench_give_the_published_scores(ovo, expected, model, total):
    found, wanted = ovo(model), expected[model]
    assert found.metrics["total"] == pytest.approx(total, abs=0.01)
    misprinted = wanted["differences_vs_published"]  # [what the predictions give, what was printed]
    assert set(misprinted) == {"Gemini": {"HLD"}, "InternVL2": {"CRR"}, "FlashVStream": set()}[model]
    for task in ovo_bench.TASKS:
        published = misprinted[task][0] if task in misprinted else wanted["published_leaderboard"][task]
        assert found.metrics[task] == pytest.approx(published, abs=0.01)
        assert found.cases[task] == tuple(wanted["counts"][task])
    for category, value in wanted["category_avg"].items():
        assert found.metrics[category] == pytest.approx(value, abs=0.01)


@pytest.mark.parametrize("model", ["Gemini", "InternVL2", "FlashVStream"])
def test_variants_give_the_other_numbers_in_use(ovo, expected, model):
    assert ovo(model, "twelve_tasks").metrics["total"] == pytest.approx(
        expected[model]["micro_12task_mean_v1"], abs=0.01
    )
    per_question = ovo(model, "forward_per_question")
    for task, value in expected[model]["forward_per_question_macro"].items():
        assert per_question.metrics[task] == pytest.approx(value, abs=0.01)
    letters, plain = ovo(model, "letters"), ovo(model)
    assert letters.metrics["total"] == pytest.approx((letters.metrics["backward"] + letters.metrics["realtime"]) / 2)
    assert letters.metrics["forward"] == plain.metrics["forward"]
    assert letters.rules["choice"] != plain.rules["choice"] and letters.rules["total"] != plain.rules["total"]


def test_questions_published_under_one_id_are_told_apart(ovo):
    """Gemini's files give five pairs of questions one id each; the official scorer never looks at ids."""
    assert ovo("Gemini").notes == ("records or probes without a reply: 35 (725, 809, 810, …)",)


# -------------------------------------------------------------------------------------------- OVO-Bench, worked by hand

CHOICE = {"id": 1, "task": "EPM", "video": "a/1.mp4", "question": "What?", "options": ["x", "y", "z"], "gt": 1}
COUNT = {
    "id": 2,
    "task": "REC",
    "video": "2.mp4",
    "test_info": [{"realtime": 3, "count": 12}, {"realtime": 5, "count": 13}],
}
STEP = {"id": 3, "task": "SSR", "video": "3.mp4", "test_info": [{"realtime": 3, "type": 1}, {"realtime": 5, "type": 0}]}


def scored(tmp_path, questions, *predictions, variants=()):
    content = {"backward": [], "realtime": [], "forward": []}
    for record in predictions:
        content["forward" if "test_info" in record else "backward"].append(record)
    return ovo_bench.score(write(tmp_path / "a.json", questions), write(tmp_path / "p.json", content), variants)


def choice(response, name=1, **more):
    return {"id": name, "task": "EPM", "response": response, **more}


@pytest.mark.parametrize(
    ("response", "official", "letters"),
    [
        ("B", 1, 1), ("B. y", 1, 1), ("The answer: B", 1, 1), ("b", 0, 1), ("b)", 0, 1), ("2", 0, 1), ("ABBA", 1, 0),
        ("A or B", 1, 0), ("a Boat", 1, 0), ("3, or B", 1, 1), ("C", 0, 0), ("", 0, 0), (None, 0, 0), (["B"], 1, 1),
        ([], 0, 0), (True, 0, 0), ({"B": 1}, 0, 0), (2, 0, 1),
    ],
)  # fmt: skip
def test_a_choice_is_a_substring_or_with_letters_a_lone_letter(tmp_path, response, official, letters):
    for right, variants in ((official, ()), (letters, ("letters",))):
        assert scored(tmp_path, [CHOICE], choice(response), variants=variants).cases["EPM"] == (right, 1)


def test_counts_and_steps_are_judged_by_probe(tmp_path):
    count = {"id": 2, "task": "REC", "test_info": [{"response": "1 or 2"}, {"response": "13 times, at 4 s"}]}
    step = {"id": 3, "task": "SSR", "test_info": [{"response": "Y"}, {"response": "No, not yet"}]}
    found = scored(tmp_path, [COUNT, STEP], count, step)
    assert found.cases["REC"] == (1, 2) and found.cases["SSR"] == (2, 2)
    step["test_info"] = [{"response": "yes"}, {"response": "Y"}]
    assert scored(tmp_path, [COUNT, STEP], step).cases["SSR"] == (0, 2)


def test_what_is_missing_is_wrong_or_by_a_variant_left_out(tmp_path):
    other = CHOICE | {"id": 4, "question": "Where?"}
    count = {"id": 2, "task": "REC", "test_info": [{"response": "12"}]}
    found = scored(tmp_path, [CHOICE, other, COUNT], choice("B"), count)
    assert found.cases["EPM"] == (1, 2) and found.cases["REC"] == (1, 2)
    assert "questions without a record: 1 (4)" in found.notes
    assert "records with another number of probes than the annotations: 1 (2)" in found.notes
    found = scored(tmp_path, [CHOICE, other, COUNT], choice("B"), count, variants=["skip_missing"])
    assert found.cases["EPM"] == (1, 1) and found.cases["REC"] == (1, 1)
    assert found.metrics["HLD"] is found.metrics["backward"] is found.metrics["total"] is None  # nothing was answered


def test_probes_are_taken_in_order_and_other_times_are_told_of(tmp_path):
    count = {
        "id": 2,
        "task": "REC",
        "test_info": [{"realtime": 3, "response": "12"}, {"realtime": 6, "response": "13"}],
    }
    found = scored(tmp_path, [COUNT], count)
    assert found.cases["REC"] == (2, 2)
    assert found.notes == ("probes at another time than in the annotations, taken by their order: 1 (2)",)


def test_unknown_and_repeated_records_are_told_of_and_change_nothing(tmp_path):
    other = [choice("B"), choice("A"), choice("B", 77), {"id": 1, "task": "XYZ", "response": "B"}]
    found = scored(tmp_path, [CHOICE], *other)
    assert found.cases["EPM"] == (1, 1)
    assert found.notes == (
        "records left out, as the annotations have no such id with that task: 2 (77 (EPM), 1 (XYZ))",
        "records left out, as not the first of their question: 1 (1)",
    )


def test_one_id_for_two_questions_of_the_same_words_serves_both(tmp_path):
    twin = CHOICE | {"id": 9, "gt": 0}
    told = dict(question="What?", video="elsewhere/1.mp4")
    pair = choice("A", ground_truth="A", **told), choice("B", ground_truth="B", **told)
    for order in (pair, pair[::-1]):
        found = scored(tmp_path, [CHOICE, twin], *order)
        assert found.cases["EPM"] == (2, 2) and found.notes == ()


def test_the_annotations_say_what_is_right(tmp_path):
    found = scored(tmp_path, [CHOICE], choice("A", ground_truth="A"))
    assert found.cases["EPM"] == (0, 1)
    assert found.notes == ("records that say another answer is right than the annotations: 1 (1)",)


@pytest.mark.parametrize(
    ("predictions", "said"),
    [
        ("{", "p.json: expected JSON, found: Expecting"),
        ("[" * 100_000, "p.json: expected JSON"),
        ("[]", "p.json: expected an object, found []"),
        ({"backward": 3}, "expected a list under 'backward', found 3"),
        ({"backward": [3]}, "p.json, backward 0: expected an object, found 3"),
        ({"realtime": [{"task": "EPM"}]}, "p.json, realtime 0: expected an id"),
        (
            {"forward": [{"id": 2, "task": "REC"}]},
            "the record of question 2: expected a list under 'test_info', found None",
        ),
        (b'{"backward": "\xff"}', "p.json: expected text in UTF-8, found: 'utf-8' codec"),
    ],
)
def test_what_is_no_prediction_is_one_line(tmp_path, predictions, said):
    write(tmp_path / "a.json", [CHOICE, COUNT])
    write(tmp_path / "p.json", predictions)
    with pytest.raises(DialogueError) as caught:
        ovo_bench.score(tmp_path / "a.json", tmp_path / "p.json")
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [{"task": "XYZ"}, {"gt": None}, {"gt": 99}, {"id": None}, {"id": [1]}])
def test_annotations_that_do_not_fit_are_an_error(tmp_path, fault):
    with pytest.raises(DialogueError, match="a.json, record 0: expected"):
        scored(tmp_path, [CHOICE | fault])


def test_an_unknown_variant_names_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match="letters or twelve_tasks, found 'lettres'"):
        scored(tmp_path, [CHOICE], variants=["lettres"])


# ----------------------------------------------------------------------------------------------------------- the report


def test_means_and_their_intervals_come_from_what_they_are_made_of():
    certain, chance = [(1, 2)] * 50, [(i % 2, 1) for i in range(400)]
    means = {"total": ["group", "c"], "group": ["a", "b"]}
    found = report.make_report("test", {"a": certain, "b": chance, "c": [(3, 4)]}, {}, means=means)
    assert list(found.metrics) == ["total", "group", "a", "b", "c"]
    assert found.metrics == {"total": 62.5, "group": 50, "a": 50, "b": 50, "c": 75}
    assert found.intervals["a"] == (50, 50) and found.intervals["c"] == (75, 75)
    low, high = found.intervals["b"]  # ± 1.96 √(¼ / 400)
    assert low == pytest.approx(45.1, abs=0.7) and high == pytest.approx(54.9, abs=0.7)
    for name, share in (("group", 2), ("total", 4)):
        width = found.intervals[name][1] - found.intervals[name][0]
        assert width == pytest.approx((high - low) / share, rel=0.01)


def test_a_metric_without_cases_is_none_and_so_is_its_mean():
    found = report.make_report("test", {"a": [], "b": [(1, 1)], "c": [(0, 0)]}, {}, means={"total": ["a", "b"]})
    assert found.metrics == {"total": None, "a": None, "b": 100, "c": None}
    assert found.intervals["total"] is found.intervals["c"] is None


def test_a_metric_with_a_unit_is_no_percentage():
    found = report.make_report("test", {"a": [(3.0, 2)]}, {}, units={"a": "s"})
    assert found.metrics == {"a": 1.5} and "1.50 s" in report.table(found)


def test_a_report_says_all_that_a_number_depends_on(tmp_path, ovo):
    found = ovo("Gemini")
    report.write(found, tmp_path / "out", {"predictions": "Gemini"})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(report.FILES)
    content = json.loads((tmp_path / "out/report.json").read_text())
    assert content["metrics"] == found.metrics and content["inputs"] == {"predictions": "Gemini"}
    assert content["counts"]["EPM"] == {"numerator": 174, "cases": 297}
    assert content["rules"] == found.rules and tuple(content["notes"]) == found.notes
    for name in ovo_bench.TASKS:
        low, high = content["intervals"][name]
        assert low < content["metrics"][name] < high
    text = (tmp_path / "out/report.md").read_text()
    assert report.table(found) in text and all(rule in text for rule in found.rules.values())
    assert "| 174 / 297 " in text and found.notes[0] in text
    assert (tmp_path / "out/scores.png").read_bytes().startswith(b"\x89PNG")


def test_names_from_files_are_drawn_as_they_are(tmp_path):
    names = ["a $b", "$x_$", "ü\n|", "\ud800"]
    report.write(report.make_report("test", {name: [(1, 2)] for name in names}, {}), tmp_path)
    assert list(json.loads((tmp_path / "report.json").read_text())["metrics"])[:2] == names[:2]
    with pytest.raises(DialogueError, match="expected at most 200 tasks, found 201"):
        report.make_report("test", {str(i): [(1, 2)] for i in range(201)}, {})


def test_a_report_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    found = report.make_report("test", {"a": [(1, 2)]}, {})
    report.write(found, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(report, "chart", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.write(report.make_report("test", {"a": [(2, 2)]}, {}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ----------------------------------------------------------------------------------------------------- files of records


def test_lines_are_named_by_their_number_and_bounded(tmp_path, monkeypatch):
    path = write(tmp_path / "p.jsonl", '{"id": 1}\n\n{"id": 2}\n')
    assert list(records.read_lines(path).items()) == [(f"{path}, line 1", {"id": 1}), (f"{path}, line 3", {"id": 2})]
    with pytest.raises(DialogueError, match="line 2: expected a JSON object, found: Expecting"):
        records.read_lines(write(path, '{"id": 1}\n{"id": \n'))
    with pytest.raises(DialogueError, match=r"line 1: expected an object, found \[1\]"):
        records.read_lines(write(path, "[1]\n"))
    monkeypatch.setattr(records, "MAX_LINE", 20)
    with pytest.raises(DialogueError, match="line 2: expected at most 20 bytes"):
        records.read_lines(write(path, '{"id": 1}\n{"id": "aaaaaaaaaaaaaaaaaaaa"}\n'))
    monkeypatch.setattr(records, "MAX_FILE", 2**20)
    with pytest.raises(DialogueError, match="expected at most 1 MiB, found 2"):
        records.read_json(write(path, " " * 2**21))


def test_a_number_is_finite_and_no_truth_value():
    assert records.number(-3, "here") == -3.0
    for value in (float("nan"), float("inf"), -(10**400), True, "1", None, [1]):
        with pytest.raises(DialogueError, match="here: expected a number, found"):
            records.number(value, "here")


# ---------------------------------------------------------------------------------------------------------- the command


def test_predictions_are_scored_without_jax(shared_data, tmp_path):
    predictions = shared_data / "evaluators/ovo_official/results/InternVL2"
    annotations = shared_data / "annotations/ovo_bench/ovo_bench_new.json"
    done = evaluate(
        "--benchmark", "ovo_bench", f"--annotations={annotations}", f"--predictions={predictions}",
        f"--out={tmp_path}", "--variant=twelve_tasks",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "| total    | 52.71 %" in done.stdout and "| 143 / 297" in done.stdout
    assert json.loads((tmp_path / "report.json").read_text())["metrics"]["total"] == pytest.approx(52.71, abs=0.01)


def test_the_command_says_what_is_wrong_in_one_line(tmp_path):
    annotations, predictions = write(tmp_path / "a.json", [CHOICE]), write(tmp_path / "p.json", "{")
    inputs = f"--annotations={annotations}", f"--predictions={predictions}", f"--out={tmp_path / 'out'}"
    for code, said, arguments in (
        (1, "p.json: expected JSON", inputs),
        (1, "expected --annotations=FILE", inputs[:2]),
        (1, "nothing.json: No such file", ("--predictions=nothing.json", inputs[0], inputs[2])),
        (1, "expected a folder outside the predictions", (inputs[0], f"--predictions={tmp_path}", inputs[2])),
        (2, "Unknown command line flag 'variants'", (*inputs, "--variants=x")),
    ):
        done = evaluate("--benchmark=ovo_bench", *arguments)
        assert done.returncode == code and said in done.stderr, done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_benchmark_and_variant_is_in_the_documentation():
    text = (PACKAGE.parent / "docs/evaluation.md").read_text(encoding="utf-8")
    for name, scorer in SCORERS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert set(re.findall("`([a-z_]+)`", row.rpartition(" | ")[2])) >= set(scorer.VARIANTS), name
