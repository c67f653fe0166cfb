"""Streamo-Bench: questions whose answer changes with time, and spans found ahead or looking back (arXiv 2512.21334).

Its annotations are unreleased, so the form is this project's: JSONL, a record for each question on each side,

    {"id": 1, "task": "tsqa", "responses": [{"time": 4.0, "text": "Two."}, {"time": 9.0, "text": "Three."}]}
    {"id": 2, "task": "forward_grounding", "span": [3.0, 7.5]}
    {"id": 3, "task": "backward_grounding", "span": [0.0, 2.0]}

with times in seconds. Predictions need no `task`; a span may be null where none was named. Win rates that the paper has
a language model judge are not here.
"""

import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError, interval_iou
from jstream.evals.metrics import Reply, match_replies
from jstream.evals.records import by_id, join, numbers, read_lines, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force
from jstream.evals.timing import plain, replies_of

TOLERANCE = 3.0  # seconds, inclusive
TASKS = ("tsqa", "forward_grounding", "backward_grounding")

_RULES = {
    "right": "A reply is right if it is matched, one to one, with a reference of the same content at most "
    "{tolerance:g} s away; there are as many matches as there can be.",
    "content": "The same letter for letter, but for case, blanks, and . ! or ? at the end.",
    "tsqa accuracy": "Right replies of all replies, over all questions together.",
    "tsqa recall": "The mean over questions of the share of references that are matched.",
    "grounding mIoU": "The mean over questions of the IoU of the two spans; 0 without one.",
    "no reply": "A question without a record has no replies and no span.",
}
VARIANTS = {
    "contains": {
        "content": "A reply says the longest right answer of its question whose words it contains, but for case, "
        "blanks, and . ! or ? at the end."
    }
}


def score(
    annotations: pathlib.Path,
    predictions: pathlib.Path,
    variants: Collection[str] = (),
    tolerance: float = TOLERANCE,
) -> Report:
    """Scores timed answers and spans.

    Args:
        variants: keys of `VARIANTS`.
        tolerance: seconds a right answer may be early or late.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for an unknown variant or a negative tolerance.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    rules["right"] = rules["right"].format(tolerance=tolerance)
    if not 0 <= tolerance < float("inf"):
        raise ConfigError(f"tolerance: expected seconds, 0 or more, found {tolerance}")
    questions = by_id(read_lines(annotations), "id")
    records, notes = join(read_lines(predictions), "id", questions)
    names = ("tsqa accuracy", "tsqa recall", "forward_grounding mIoU", "backward_grounding mIoU")
    parts: dict[str, list[Part]] = {name: [] for name in names}
    for name, (where, question) in questions.items():
        task, there = text_of(question, "task", where), records.get(name)
        if task not in TASKS:
            raise DialogueError(f"{where}: expected a task of {', '.join(TASKS)}, found {task!r:.80}")
        if task == "tsqa":
            wanted = [Reply(reply.time, plain(reply.text)) for reply in replies_of(question, where)]
            said = replies_of(there[1], there[0]) if there else []
            said = [Reply(reply.time, _content(reply.text, wanted, "contains" in variants)) for reply in said]
            right = len(match_replies(said, wanted, tolerance, exact=True))
            parts["tsqa accuracy"].append((right, len(said)))
            parts["tsqa recall"] += [(right / len(wanted), 1)] if wanted else []
        else:
            span = _span(question, where)
            if span is None:
                raise DialogueError(f"{where}: expected a list of 2 numbers, found None")
            named = _span(there[1], there[0]) if there else None
            parts[f"{task} mIoU"].append((interval_iou(named, span) if named else 0.0, 1))
    return make_report("Streamo-Bench", parts, rules, notes)


def _content(text: str, wanted: Sequence[Reply], contains: bool) -> str:
    """What of the right answers a reply says, else the reply itself."""
    text = plain(text)
    if contains:
        said = [answer.text for answer in wanted if re.search(rf"(?<!\w){re.escape(answer.text)}(?!\w)", text)]
        return max(said, key=len, default=text)
    return text


def _span(record: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    if record.get("span") is None:
        return None
    start, end = numbers(record["span"], 2, where)
    return start, end
