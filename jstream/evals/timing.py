"""Timing-aware F1: what a reply is worth falls with its distance from when it was due (after StreamPro).

Annotations and predictions are JSONL of one form, a record for each question (or stream) on each side; `task` is of use
in the annotations, where the scores are also to be told by task:

    {"id": "kitchen-1", "task": "narration", "responses": [{"time": 12.0, "text": "The kettle boils."}, …]}

Times are in seconds on the clock of both files. A model that stayed silent has an empty list.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals.metrics import Reply
from jstream.evals.records import by_id, join, list_of, number, object_of, read_lines, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force

TOLERANCE = 3.0  # seconds: τ
MAX_REPLIES = 1000  # of a record: what is matched grows with the square

_RULES = {
    "worth": "A reply matched with a reference of the same text is worth max(0, 1 − |Δt| / τ), τ = {tolerance:g} s.",
    "same text": "Letter for letter, but for case, blanks, and . ! or ? at the end.",
    "matching": "One to one within a question, so that the total worth is as large as it can be.",
    "precision, recall": "The total worth over all replies, and over all references; of all questions together.",
    "total": "F1, the harmonic mean of the two; so for each task.",
    "no reply": "A question without a record has no replies.",
}
VARIANTS = {"any_text": {"same text": "Any two texts are the same: only times count."}}


def score(
    annotations: pathlib.Path,
    predictions: pathlib.Path,
    variants: Collection[str] = (),
    tolerance: float = TOLERANCE,
) -> Report:
    """Scores timed replies.

    Args:
        variants: keys of `VARIANTS`.
        tolerance: τ in seconds.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for an unknown variant or a τ of 0.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    rules["worth"] = rules["worth"].format(tolerance=tolerance)
    if not 0 < tolerance < float("inf"):
        raise ConfigError(f"tolerance: expected seconds above 0, found {tolerance}")
    questions = by_id(read_lines(annotations), "id")
    records, notes = join(read_lines(predictions), "id", questions)
    parts: dict[str, list[Part]] = {"total": [], "precision": [], "recall": []}
    for name, (where, question) in questions.items():
        wanted = replies_of(question, where)
        said = replies_of(records[name][1], records[name][0]) if name in records else []
        total = worth(said, wanted, tolerance, any_text="any_text" in variants)
        for key in ["total", *([text_of(question, "task", where)] if "task" in question else [])]:
            parts.setdefault(key, []).append((2 * total, len(said) + len(wanted)))
        parts["precision"].append((total, len(said)))
        parts["recall"].append((total, len(wanted)))
    return make_report("Timing-aware F1", parts, rules, notes)


def worth(predicted: Sequence[Reply], reference: Sequence[Reply], tolerance: float, any_text: bool = False) -> float:
    """The largest total of max(0, 1 − |Δt| / τ) over one-to-one matchings of replies with the same text.

    Two pairs of a worth that cross in time can be uncrossed without loss, so an alignment in order of time is enough.
    """
    total = 0.0
    for text in {"" if any_text else plain(reply.text) for reply in reference}:
        mine, theirs = (
            sorted(reply.time for reply in replies if any_text or plain(reply.text) == text)
            for replies in (predicted, reference)
        )
        best = [0.0] * (len(theirs) + 1)  # of the replies so far, and the first j references
        for a in mine:
            row = [0.0]
            for j, b in enumerate(theirs):
                row.append(max(row[j], best[j + 1], best[j] + max(0.0, 1 - abs(a - b) / tolerance)))
            best = row
        total += best[-1]
    return total


def plain(text: str) -> str:
    """A text without what makes no difference: case, blanks, and . ! or ? at the end."""
    return " ".join(text.casefold().split()).rstrip(".!? ")


def replies_of(record: Mapping[str, Any], where: str) -> list[Reply]:
    """The `responses` of a record.

    Raises:
        DialogueError: they do not fit, or there are too many.
    """
    responses = list_of(record, "responses", where)
    if len(responses) > MAX_REPLIES:
        raise DialogueError(f"{where}: expected at most {MAX_REPLIES} responses, found {len(responses)}")
    said = [object_of(response, where) for response in responses]
    return [Reply(number(response.get("time"), where), text_of(response, "text", where)) for response in said]
