"""COIN as VideoLLM-online scores it: which step, which task, and which steps come next (arXiv 2406.11816, table 3).

Annotations: `coin.json` of the data set (coin-dataset/annotations), of which the test videos are asked about.
Predictions are JSONL, a record for each question:

    {"id": "step/VIDEO/0", "response": "Cut in half."}            what step 0 of the video is
    {"id": "task/VIDEO", "response": "Make orange juice."}         what the video is about
    {"id": "next/VIDEO/0", "response": "Squeeze out the juice."}   the step after step 0
    {"id": "proc/VIDEO/0", "response": "1. …\\n2. …"}               the steps after it, at most five, one a line
    {"id": "proc+/VIDEO/0", "response": "1. …\\n2. …"}              the same, where the task was told

The rules are those of `data/coin/benchmarks.py` in showlab/videollm-online. Tasks without any record are not scored.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Collection, Sequence

import numpy as np
from tqdm import tqdm

from jstream.data.dialogue import DialogueError
from jstream.evals.records import id_of, join, list_of, object_of, read_json, read_lines, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force

TASKS = ("step", "task", "next", "proc", "proc+")
MAX_STEPS = 5  # that are asked for at a time
_MAX_TEXT = 500  # characters of a reply that are looked at: several times the longest category

_RULES = {
    "right": "A line of a reply is right if it is the right category, or that is the nearest to it by edit distance, "
    "the first in the alphabet of several; without its number, the last full stop, and case.",
    "categories": "The steps, or tasks, of all test videos.",
    "step, task, next": "Share of right questions; the first line counts.",
    "proc, proc+": "Share of right steps, in order, of all steps of all questions.",
    "no reply": "A question or step without a reply is wrong.",
}
VARIANTS = {
    "skip_missing": {
        "no reply": "A question or step without a reply leaves the denominators (as released, of proc and proc+)."
    },
}


def score(annotations: pathlib.Path, predictions: pathlib.Path, variants: Collection[str] = ()) -> Report:
    """Scores replies about the test videos; `variants` are keys of `VARIANTS`.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for an unknown variant.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    questions = _questions(annotations)
    lines = read_lines(predictions)
    asked = {str(id_of(record, "id", where)).partition("/")[0] for where, record in lines.items()}
    questions = {name: answers for name, answers in questions.items() if name.partition("/")[0] in asked}
    records, notes = join(lines, "id", questions)
    categories: dict[bool, set[str]] = {True: set(), False: set()}
    for name, answers in questions.items():
        categories[name.startswith("task/")] |= set(answers)
    nearest = {of_tasks: nearest_of(sorted(found)) for of_tasks, found in categories.items() if found}

    parts: dict[str, list[Part]] = {task: [] for task in TASKS}
    for name, answers in tqdm(questions.items(), unit="question", delay=2, leave=False, dynamic_ncols=True):
        task = name.partition("/")[0]
        said = text_of(records[name][1], "response", records[name][0]).strip().split("\n") if name in records else []
        pairs = [(_plain(line), answer) for line, answer in zip(said, answers)]
        right = sum(line == answer or nearest[task == "task"](line) == answer for line, answer in pairs)
        parts[task].append((right, len(pairs) if "skip_missing" in variants else len(answers)))
    return make_report("COIN", parts, rules, notes)


def _questions(path: pathlib.Path) -> dict[str, list[str]]:
    """The right categories by the id of the question, one for each line of the reply."""
    database = object_of(object_of(read_json(path), str(path)).get("database"), f"{path}, 'database'")
    questions = {}
    for video, record in database.items():
        where = f"{path}, {video}"
        if "test" not in text_of(object_of(record, where), "subset", where).lower():
            continue
        steps = [text_of(object_of(step, where), "label", where) for step in list_of(record, "annotation", where)]
        steps = [_plain(_READABLE.get(step, step)) for step in steps]
        questions[f"task/{video}"] = [_plain(_words(text_of(record, "class", where)))]
        for i, step in enumerate(steps):
            questions[f"step/{video}/{i}"] = [step]
        for i in range(len(steps) - 1):
            questions[f"next/{video}/{i}"] = [steps[i + 1]]
            for task in ("proc", "proc+"):
                questions[f"{task}/{video}/{i}"] = steps[i + 1 : i + 1 + MAX_STEPS]
    if not questions:
        raise DialogueError(f"{path}: expected videos of a test subset, found none of {len(database)}")
    return questions


_READABLE = {  # two labels that hold a list
    "process (crop, fold) paper": "crop and fold paper",
    "try to press gun head, spray residual old grease": "try to press gun head to spray residual old grease",
}


def _words(name: str) -> str:
    """`put on hair` of `PutOnHair`, `replace SIM card` of `ReplaceSIMCard`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)


def _plain(line: str) -> str:
    return re.sub(r"^\s*\d+[.)]\s*", "", line).strip().lower().rstrip(".")


def nearest_of(categories: Sequence[str]) -> Callable[[str], str]:
    """A function that finds the category nearest to a text by edit distance (Levenshtein), the first of several."""
    lengths = np.array([len(category) for category in categories])
    codes = np.zeros((len(categories), max(lengths)), np.int32)  # [C, W]
    for row, category in zip(codes, categories):
        row[: len(category)] = [ord(character) for character in category]
    columns = np.arange(codes.shape[1] + 1)

    @functools.cache
    def nearest(text: str) -> str:
        distances = np.tile(columns, (len(codes), 1))  # [C, 1 + W]: of the text so far and each start of a category
        for character in text[:_MAX_TEXT]:
            changed = distances[:, :-1] + (codes != ord(character))
            row = np.concatenate([distances[:, :1] + 1, np.minimum(distances[:, 1:] + 1, changed)], axis=1)
            distances = np.minimum.accumulate(row - columns, axis=1) + columns  # or a letter more of the category
        return categories[int(np.argmin(distances[np.arange(len(codes)), lengths]))]

    return nearest
