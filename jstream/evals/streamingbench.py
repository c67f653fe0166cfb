"""StreamingBench: choices about a moment, chains of them, and output on cue (arXiv 2411.03628).

Annotations: one of `questions_real.json`, `questions_omni.json`, `questions_sqa.json`, `questions_proactive.json` of
THUNLP-MT/StreamingBench; which it is shows in what it holds. Predictions: what its evaluation writes, the same file
with the model's reply in every question under the name of the model:

    {"questions": [{"question": "…", "answer": "C", …, "MiniCPM-V": "C"}], "video_path": "…", …}
    {"questions": [{…, "MiniCPM-V": {"answered": 28, "dialog_history": [{"content": "3", "time": 28, …}]}}], …}

The rules are those of its `src/data/count.py`. In `sqa` a question is asked with the right answers to those before it.
"""

import collections
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals.records import list_of, note, number, object_of, read_json, reply_of, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force

TOLERANCE = 2.0  # seconds that an output on cue may be early or late
_NOT_MODELS = {"results", "audio_path"}  # other keys that the official evaluation adds to a question

_RULES = {
    "choice": "Right if the first character of the reply is the right letter, by case.",
    "output on cue": "Its time is right within 2 s, its answer if moreover the right text is a substring of what was "
    "said last, by case.",
    "no reply": "A question without a reply, or with an empty one, is wrong.",
    "total": "The share of right questions over all.",
}
VARIANTS = {
    "stripped": {"choice": "Right if the first character of the reply, but for blanks, is the right letter, by case."},
    "skip_missing": {"no reply": "A question without a reply, or with an empty one, is left out (as official)."},
}


def score(
    annotations: pathlib.Path,
    predictions: pathlib.Path,
    variants: Collection[str] = (),
    model: str | None = None,
    tolerance: float = TOLERANCE,
) -> Report:
    """Scores an official file of predictions.

    Args:
        variants: keys of `VARIANTS`.
        model: whose replies, where the file has those of several.
        tolerance: seconds that an output on cue may be early or late.

    Raises:
        DialogueError: a file cannot be read, or a question does not fit.
        ConfigError: for an unknown variant or model.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    rules["output on cue"] = rules["output on cue"].replace("2 s", f"{tolerance:g} s")
    questions, records = dict(_questions(annotations)), dict(_questions(predictions))
    model = _model_of(questions, records, model)

    faults: dict[str, list[Any]] = collections.defaultdict(list)
    parts: dict[str, list[Part]] = {}
    for key, question in questions.items():
        reply, where = records.get(key, {}).get(model), f"{annotations}, {key[0]} at {key[1]}"
        on_cue = "ground_truth_output" in question
        if on_cue:
            found = _judge_on_cue(question, reply, tolerance, f"{predictions}, {key[0]} at {key[1]}")
        else:
            text = reply_of(reply, " at ".join(key[:2]), faults) if reply is not None else None
            text = text.lstrip() if text and "stripped" in variants else text
            found = {"": text[0] == text_of(question, "answer", where)} if text else None
        if found is None:
            faults["questions without a reply"].append(" at ".join(key[:2]))
            if "skip_missing" in variants:
                continue
            found = {"time": False, "answer": False} if on_cue else {"": False}
        for what, right in found.items():
            parts.setdefault(f"total {what}".strip(), []).append((right, 1))
            if not on_cue:
                parts.setdefault(text_of(question, "task_type", where), []).append((right, 1))
    notes = note(
        "replies left out, as the annotations lack their question",
        [" at ".join(k[:2]) for k in records.keys() - questions],
    )
    for what, which in faults.items():
        notes += note(what, which)
    return make_report("StreamingBench", parts, rules, notes)


Key = tuple[str, str, str, int]


def _questions(path: pathlib.Path) -> Iterator[tuple[Key, dict[str, Any]]]:
    """Questions by video, time and words, and a number for those that have the same of these."""
    content = list_of({"videos": read_json(path)}, "videos", str(path))
    entries = [entry for item in content for entry in (item if isinstance(item, list) else [item])]
    seen: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for number_, entry in enumerate(entries):
        where = f"{path}, record {number_}"
        video = text_of(object_of(entry, where), "video_path", where).rpartition("/")[2]
        for question in list_of(entry, "questions", where):
            words = [text_of(object_of(question, where), key, where) for key in ("time_stamp", "question")]
            key = (video, words[0], words[1])
            seen[key] += 1
            yield (*key, seen[key]), question


def _model_of(questions: dict[Key, Any], records: dict[Key, Any], model: str | None) -> str:
    known = {key for question in questions.values() for key in question} | _NOT_MODELS
    models = {key: None for record in records.values() for key in record if key not in known}
    if model is None and len(models) == 1:
        return next(iter(models))
    if model is None or model not in models:
        names = ", ".join(models) or "none"
        raise ConfigError(f"model: expected the name of one whose replies are there ({names:.200}), found {model}")
    return model


def _judge_on_cue(question: dict[str, Any], reply: Any, tolerance: float, where: str) -> dict[str, bool] | None:
    """Whether the time and the answer of an output on cue are right; None where there was none."""
    history = None if reply is None else list_of(object_of(reply, where), "dialog_history", where)
    if not history:
        return None
    last = object_of(history[-1], where)
    wanted = _seconds(text_of(question, "ground_truth_time_stamp", where), where)
    in_time = abs(number(last.get("time"), where) - wanted) <= tolerance
    said = last.get("content")
    return {"time": in_time, "answer": in_time and isinstance(said, str) and question["ground_truth_output"] in said}


def _seconds(time_stamp: str, where: str) -> int:
    """Of `0:03:10`."""
    if not re.fullmatch(r"\d{1,4}(:\d{1,2}){0,2}", time_stamp.strip()):
        raise DialogueError(f"{where}: expected a time such as 0:03:10, found {time_stamp!r:.80}")
    return sum(int(part) * 60**i for i, part in enumerate(reversed(time_stamp.split(":"))))
