"""Charades-STA: the moment of a sentence in a video of half a minute (Gao et al., 2017, arXiv 1705.02101).

Annotations: `charades_sta_test.txt`, lines of `VIDEO START END##SENTENCE`. Predictions are JSONL, a record for each of
its lines by number, counted from 1; a span may be null where none was found:

    {"id": 1, "span": [24.0, 30.1]}
"""

import pathlib
from collections.abc import Collection

from jstream.data.dialogue import DialogueError, interval_iou
from jstream.evals.records import join, number, numbers, read_lines, read_text
from jstream.evals.report import Part, Report, make_report, rules_in_force

THRESHOLDS = (0.3, 0.5, 0.7)
VARIANTS: dict[str, dict[str, str]] = {}
_RULES = {
    "R1": "Share of sentences whose span has at least that IoU with the right one.",
    "mIoU": "Mean over sentences of the IoU of the two spans.",
    "no prediction": "A sentence without a record or span has an IoU of 0, and so has one whose right span is empty.",
}


def score(annotations: pathlib.Path, predictions: pathlib.Path, variants: Collection[str] = ()) -> Report:
    """Scores one span a sentence.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for a variant; there are none.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    spans = {}
    for line, text in enumerate(read_text(annotations).splitlines(), start=1):
        if text.strip():
            spans[line] = _read_span(text, f"{annotations}, line {line}")
    records, notes = join(read_lines(predictions), "id", spans)
    parts: dict[str, list[Part]] = {name: [] for name in (*(f"R1@{t}" for t in THRESHOLDS), "mIoU")}
    for line, span in spans.items():
        where, record = records.get(line, ("", {}))
        named = None if record.get("span") is None else numbers(record["span"], 2, where)
        iou = interval_iou((named[0], named[1]), span) if named else 0.0
        for threshold in THRESHOLDS:
            parts[f"R1@{threshold}"].append((iou >= threshold, 1))
        parts["mIoU"].append((iou, 1))
    return make_report("Charades-STA", parts, rules, notes)


def _read_span(line: str, where: str) -> tuple[float, float]:
    head, marks, sentence = line.partition("##")
    words = head.split()
    if len(words) != 3 or not marks or not sentence.strip():
        raise DialogueError(f"{where}: expected VIDEO START END##SENTENCE, found {line!r:.80}")
    try:
        start, end = (number(float(word), where) for word in words[1:])
    except ValueError:
        raise DialogueError(f"{where}: expected VIDEO START END##SENTENCE, found {line!r:.80}") from None
    return start, end
