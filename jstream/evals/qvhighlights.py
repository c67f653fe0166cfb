"""QVHighlights: moments retrieved and highlights detected in videos of 150 s (arXiv 2107.09609).

Annotations: `highlight_val_release.jsonl`. Predictions: a submission to its official scorer, one line a query

    {"qid": 2579, "pred_relevant_windows": [[start, end, score], …], "pred_saliency_scores": [score, …]}

with times in seconds, the best window first, and one saliency score for every clip of two seconds; either of the two
lists may be left out of all records. The rules are those of `standalone_eval` in jayleicn/moment_detr.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jstream.data.dialogue import DialogueError, interval_iou
from jstream.evals.records import by_id, join, list_of, number, numbers, read_lines
from jstream.evals.report import Part, Report, make_report, rules_in_force

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LENGTHS = {"full": (0, np.inf), "short": (0, 10), "middle": (10, 30), "long": (30, np.inf)}  # seconds: above, up to
SALIENCY = {"Fair": 2, "Good": 3, "VeryGood": 4}  # of 0 to 4: the least of a highlight
MAX_WINDOWS = 10  # predicted ones of a query that count
CLIP = 2.0  # seconds

VARIANTS: dict[str, dict[str, str]] = {}
_RULES = {
    "R1": "Share of queries whose first predicted window has at least that IoU with a right one.",
    "mAP": "Mean over queries of the interpolated average precision of the first 10 predicted windows, by score; a "
    "right window is found once. Without @, the mean over IoU 0.50, 0.55 … 0.95.",
    "short, middle, long": "The same with only the right windows of up to 10 s, up to 30 s, and longer.",
    "highlight mAP": "Mean over queries and three annotators of the average precision of clips by saliency; a "
    "highlight has at least that annotated saliency (Fair 2, Good 3, VeryGood 4).",
    "highlight HIT@1": "Share of queries whose most salient clip is a highlight for any of the three.",
    "no prediction": "A query without a record or window scores 0.",
}


def score(annotations: pathlib.Path, predictions: pathlib.Path, variants: Collection[str] = ()) -> Report:
    """Scores a submission.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for a variant; there are none.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    queries = by_id(read_lines(annotations), "qid")
    records, notes = join(read_lines(predictions), "qid", queries)
    parts: dict[str, list[Part]] = {}
    if any("pred_relevant_windows" in record for _, record in records.values()):
        cells = moments(queries, records)
        for length in LENGTHS:
            prefix = "" if length == "full" else f"{length} "
            for name in ("R1@0.5", "R1@0.7", "mAP", "mAP@0.5", "mAP@0.75")[: 5 if length == "full" else 3]:
                parts[f"{prefix}{name}"] = cells.get((length, name), [])
    if any("pred_saliency_scores" in record for _, record in records.values()):
        parts |= highlights(queries, records)
    if not parts:
        raise DialogueError(f"{predictions}: expected 'pred_relevant_windows' or 'pred_saliency_scores', found neither")
    return make_report("QVHighlights", parts, rules, notes)


# -------------------------------------------------------------------------------------------------------------- moments

Records = Mapping[Any, tuple[str, dict[str, Any]]]


def moments(queries: Records, records: Records) -> dict[tuple[str, str], list[Part]]:
    """The parts of (length, metric), for every length and R1@x, mAP@x of every threshold, and mAP."""
    found: dict[tuple[str, str], list[Part]] = {}
    for qid, (where, query) in tqdm(queries.items(), unit="query", delay=2, leave=False, dynamic_ncols=True):
        right = [tuple(numbers(w, 2, where)) for w in list_of(query, "relevant_windows", where)]
        where, record = records.get(qid, ("", {}))
        windows = list_of(record, "pred_relevant_windows", where)[:MAX_WINDOWS] if record else []
        predicted = [numbers(window, 3, where) for window in windows]
        for length, (above, up_to) in LENGTHS.items():
            wanted = [(start, end) for start, end in right if length == "full" or above < end - start <= up_to]
            if wanted:
                ious = np.array([[interval_iou((p[0], p[1]), w) for w in wanted] for p in predicted])
                first = ious[0].max() if len(ious) else 0.0
                precisions = _average_precisions(ious, [p[2] for p in predicted])
                values = {f"R1@{t}": float(first >= t) for t in THRESHOLDS}
                values |= {f"mAP@{t}": ap for t, ap in zip(THRESHOLDS, precisions)}
                for name, value in (values | {"mAP": float(np.mean(precisions))}).items():
                    found.setdefault((length, name), []).append((value, 1))
    return found


def _average_precisions(ious: np.ndarray, scores: Sequence[float]) -> list[float]:
    """Of the windows predicted for one query, at each threshold; ious [predicted, right]."""
    order = np.argsort(-np.asarray(scores), kind="stable")
    found = []
    for threshold in THRESHOLDS:
        free, hits = set(range(ious.shape[1] if len(ious) else 0)), []
        for row in ious[order] if len(ious) else ():
            best = max((j for j in free if row[j] >= threshold), key=lambda j: (row[j], j), default=None)
            free.discard(best)  # type: ignore[arg-type]
            hits.append(best is not None)
        precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
        best_after = np.maximum.accumulate(precision[::-1])[
            ::-1
        ]  # interpolated: the best at this recall or a higher one
        found.append(float(best_after[np.array(hits, bool)].sum()) / ious.shape[1] if len(ious) else 0.0)
    return found


# ----------------------------------------------------------------------------------------------------------- highlights


def highlights(queries: Records, records: Records) -> dict[str, list[Part]]:
    """The parts of `HL-min-Fair mAP` and so on."""
    found = {f"HL-min-{name} {what}": [] for name in SALIENCY for what in ("mAP", "HIT@1")}
    for qid, (where, query) in queries.items():
        annotated = _annotated(query, where)  # [clips, 3]
        where, record = records.get(qid, ("", {}))
        given = numbers(record["pred_saliency_scores"], None, where) if "pred_saliency_scores" in record else []
        predicted = np.zeros(len(annotated))
        predicted[: len(given)] = given[: len(annotated)]
        for name, least in SALIENCY.items():
            right = annotated >= least
            top = int(np.argmax(given)) if given else len(right)
            hit = bool(right[top].any()) if top < len(right) else False
            precisions = [_clip_precision(right[:, i], predicted) if given else 0.0 for i in range(right.shape[1])]
            found[f"HL-min-{name} mAP"].append((float(np.mean(precisions)), 1))
            found[f"HL-min-{name} HIT@1"].append((hit, 1))
    return found


def _annotated(query: Mapping[str, Any], where: str) -> np.ndarray:
    """[clips, 3]: the saliency that three annotators gave, 0 outside the relevant clips."""
    clips = numbers(query.get("relevant_clip_ids"), None, where)
    rows = [numbers(row, 3, where) for row in list_of(query, "saliency_scores", where)]
    total = int(number(query.get("duration"), where) / CLIP)
    if len(rows) != len(clips) or not all(0 <= clip < total <= 10**6 for clip in clips):
        raise DialogueError(f"{where}: expected a saliency for every relevant clip of {total}, found {len(rows)}")
    annotated = np.zeros((total, 3))
    annotated[np.array(clips, int)] = np.array(rows).reshape(-1, 3)
    return annotated


def _clip_precision(right: np.ndarray, scores: np.ndarray) -> float:
    """Mean, over the recalls that can be reached, of the best precision there or at a higher recall.

    Clips of one score come together; the official scorer takes the plain mean over recalls, not one by their distance.
    """
    if not right.any():
        return 0.0
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # of its score
    hits, taken = np.cumsum(right[order])[last], np.flatnonzero(last) + 1
    best_after = np.maximum.accumulate((hits / taken)[::-1])[::-1]
    return float(best_after[np.diff(hits, prepend=0) > 0].mean())
