"""OVO-Bench: scores the official files of predictions against its annotations (arXiv 2501.05510).

Annotations: `data/ovo_bench_new.json` of JoeLeelyf/OVO-Bench. Predictions: what its inference writes, as one file or a
folder of them, each `{"backward": […], "realtime": […], "forward": […]}` of records

    {"id": 0, "task": "EPM", "response": "C", …}
    {"id": 1558, "task": "REC", "test_info": [{"realtime": 17, "response": "1", …}, …], …}

Right is what the annotations say, not what a record repeats of them. The rules are those of the official scorer
(`utils/OVOBenchScore.py` there) with the totals of its second version; `VARIANTS` has the others that are in use.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from jstream.data.dialogue import DialogueError
from jstream.evals.records import id_of, json_files, list_of, note, object_of, read_json, reply_of, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force

CATEGORIES = {
    "backward": ("EPM", "ASI", "HLD"),
    "realtime": ("OCR", "ACR", "ATR", "STU", "FPD", "OJR"),
    "forward": ("REC", "SSR", "CRR"),
}
TASKS = tuple(itertools.chain(*CATEGORIES.values()))
_RULES = {
    "choice": "Right if the letter of the right option is a substring of the reply, by case.",
    "REC": "Right if all digits of the reply, joined, are the count.",
    "SSR, CRR": "Right if the reply is Y or contains Yes where the probe is to be affirmed, else N or No, by case.",
    "no reply": "A question or probe without a record, or with null for a reply, is wrong.",
    "repeated": "The first record of an id counts. One more stands for another question of the same words about the "
    "same video, where that has none.",
    "tasks": "The share of right probes over all questions. A task without any record has no score, nor has a mean "
    "of it.",
    "forward tasks": "As the others.",
    "categories": "The mean of the tasks in it.",
    "total": "The mean of the three categories.",
}
VARIANTS = {
    "skip_missing": {
        "no reply": "A question or probe without a record leaves the denominators (as official); null for a reply is "
        "wrong.",
    },
    "forward_per_question": {"forward tasks": "The mean over questions of the share of right probes in each."},
    "letters": {
        "choice": "Right if the first lone letter A to D of the upper-cased reply is the right one; where there is "
        "none, the first lone digit 1 to 4 (SimpleStream).",
        "total": "The mean of backward and realtime.",
    },
    "twelve_tasks": {"total": "The mean of the 12 tasks, as in the first version of the benchmark."},
}


def score(annotations: pathlib.Path, predictions: pathlib.Path, variants: Collection[str] = ()) -> Report:
    """Scores predictions of the official form; `variants` are keys of `VARIANTS`.

    Raises:
        DialogueError: a file cannot be read, or a record has no id.
        ConfigError: for an unknown variant.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    questions = _read_annotations(annotations)
    records, unknown = [], []
    for where, record in _read_predictions(predictions):
        question = questions.get(id_of(record, "id", where))
        known = question is not None and record.get("task") == question["task"]
        records.append(record) if known else unknown.append(f"{record['id']} ({record.get('task')})")
    found, repeated = _assign(records, questions)

    faults: dict[str, list[Any]] = collections.defaultdict(list)
    parts: dict[str, list[Part]] = {task: [] for task in TASKS}
    for name, question in questions.items():
        right = _judge(question, found.get(name), variants, faults)
        if "forward_per_question" in variants and question["task"] in CATEGORIES["forward"] and right:
            right = [sum(right) / len(right)]
        parts[question["task"]].append((sum(right), len(right)))
    answered = {questions[name]["task"] for name in found}
    parts = {task: of if task in answered else [] for task, of in parts.items()}
    notes = note("records left out, as the annotations have no such id with that task", unknown)
    notes += note("records left out, as not the first of their question", [record["id"] for record in repeated])
    for what, which in faults.items():
        notes += note(what, which)
    top = TASKS if "twelve_tasks" in variants else tuple(CATEGORIES)[: 2 if "letters" in variants else 3]
    return make_report("OVO-Bench", parts, rules, notes, means={"total": top, **CATEGORIES})


def _read_annotations(path: pathlib.Path) -> dict[int | str, dict[str, Any]]:
    questions = {}
    for number, record in enumerate(list_of({"questions": read_json(path)}, "questions", str(path))):
        where = f"{path}, record {number}"
        task = text_of(object_of(record, where), "task", where)
        if task not in TASKS:
            raise DialogueError(f"{where}: expected a task of {', '.join(TASKS)}, found {task!r:.80}")
        if task in CATEGORIES["forward"]:
            key, whole = ("count" if task == "REC" else "type"), True
            for probe in list_of(record, "test_info", where):
                whole = whole and isinstance(probe, dict) and isinstance(probe.get(key), int)
        else:
            key, whole = "gt", isinstance(record.get("gt"), int) and 0 <= record["gt"] < 26
        if not whole:
            raise DialogueError(f"{where}: expected what is right under {key!r}, found none")
        questions[id_of(record, "id", where)] = record
    return questions


def _read_predictions(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file in json_files(path):
        content = object_of(read_json(file), str(file))
        for category in CATEGORIES:
            records = list_of(content, category, str(file)) if category in content else []
            found += [(f"{file}, {category} {i}", record) for i, record in enumerate(records)]
    return [(where, object_of(record, where)) for where, record in found]


def _assign(
    records: list[dict[str, Any]], questions: Mapping[int | str, dict[str, Any]]
) -> tuple[dict[int | str, dict[str, Any]], list[dict[str, Any]]]:
    """Gives each question its record: by id, but two questions of the same words may have come under one id, as in the
    published predictions of Gemini; what the record repeats of the right answer tells them apart."""

    def words(record: Mapping[str, Any]) -> tuple[Any, ...]:
        video = str(record.get("video"))
        return record["task"], video.rpartition("/")[2], str(record.get("question"))

    def agrees(record: Mapping[str, Any], name: int | str) -> bool:
        return record.get("ground_truth") in (None, _letter(questions[name]))

    same = collections.defaultdict(list)
    for name, question in questions.items():
        same[words(question)].append(name)
    found: dict[int | str, dict[str, Any]] = {}
    for candidates in (
        lambda record: [record["id"]] if agrees(record, record["id"]) else [],
        lambda record: [name for name in same[words(record)] if agrees(record, name)],
        lambda record: [record["id"]],
    ):
        left = []
        for record in records:
            name = next((name for name in candidates(record) if name not in found), None)
            left.append(record) if name is None else found.update({name: record})
        records = left
    return found, records


def _letter(question: Mapping[str, Any]) -> str | None:
    return chr(ord("A") + question["gt"]) if "gt" in question else None


def _judge(
    question: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    variants: Collection[str],
    faults: dict[str, list[Any]],
) -> list[bool]:
    """Whether each probe of a question is right; a choice is one probe. Those left out by a variant are not there."""
    name, is_choice = question["id"], "gt" in question
    probes = [question] if is_choice else question["test_info"]
    if record is None:
        faults["questions without a record"].append(name)
        replies = []
    else:
        replies = [record] if is_choice else list_of(record, "test_info", f"the record of question {name}")
        if record.get("ground_truth") not in (None, _letter(question)):
            faults["records that say another answer is right than the annotations"].append(name)
        if len(replies) != len(probes):
            faults["records with another number of probes than the annotations"].append(name)
    right = []
    for probe, reply in itertools.zip_longest(probes, replies[: len(probes)]):
        if reply is None and "skip_missing" in variants:
            continue
        text = reply_of(reply.get("response"), name, faults) if isinstance(reply, dict) else None
        if isinstance(reply, dict) and reply.get("realtime") not in (None, probe.get("realtime")):
            faults["probes at another time than in the annotations, taken by their order"].append(name)
        right.append(text is not None and _is_right(question["task"], probe, text, "letters" in variants))
    return right


def _is_right(task: str, probe: Mapping[str, Any], text: str, letters: bool) -> bool:
    if task == "REC":
        return "".join(re.findall(r"\d+", text)) == str(probe["count"])
    if task in ("SSR", "CRR"):
        return text == ("Y" if probe["type"] else "N") or ("Yes" if probe["type"] else "No") in text
    gold = chr(ord("A") + probe["gt"])
    if not letters:
        return gold in text
    letter, digit = (re.search(pattern, text.upper()) for pattern in (r"\b[A-D]\b", r"\b[1-4]\b"))
    return (letter[0] if letter else chr(ord("@") + int(digit[0])) if digit else None) == gold
