"""Dense captions: events found and described (ActivityNet Captions, YouCook2), as SODA_c, CIDEr and METEOR-stem.

Annotations and predictions are of the official forms, with times in seconds:

    {"v_abc": {"duration": 82.7, "timestamps": [[0.8, 19.9], …], "sentences": ["A woman …", …]}, …}
    {"results": {"v_abc": [{"timestamp": [0, 20], "sentence": "A woman …"}, …], …}, …}

CIDEr and METEOR-stem go by densevid_eval (`evaluate2018.py` in ttengwang/PDVC), SODA_c by fujiso/SODA (Fujita et al.,
2020). What two captions have in common is measured by `evals.caption_scores`: CIDEr is the usual one but for how words
are told apart; METEOR-stem is not the METEOR that papers report, and so neither is SODA_c, which is built on it.
"""

import pathlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from tqdm import tqdm

from jstream.data.dialogue import DialogueError, interval_iou
from jstream.evals.caption_scores import cider, meteor_stem, words_of
from jstream.evals.records import list_of, note, numbers, object_of, read_json, text_of
from jstream.evals.report import Part, Report, make_report, rules_in_force

THRESHOLDS = (0.3, 0.5, 0.7, 0.9)
MAX_EVENTS = 1000  # predicted ones of a video that count, as official
MAX_WORDS = 200  # of a sentence: what is compared grows with the square
_NOTHING = ["abc123"]  # what an event is compared with that overlaps none, as official

VARIANTS: dict[str, dict[str, str]] = {}
_RULES = {
    "SODA_c": "F1 over all events: events are paired in order of time so that the sum of IoU × METEOR-stem is largest; "
    "precision is that sum over the predicted, recall over the annotated events.",
    "CIDEr, METEOR-stem": "Each predicted event is compared with every annotated one of at least that IoU, or with "
    "nothing; mean over these pairs of a video, over videos, and over IoU 0.3, 0.5, 0.7 and 0.9.",
    "CIDEr": "CIDEr-D, times 100; words are weighed by the pairs of one video, as official.",
    "METEOR-stem": "METEOR of 2005 with exact and stem matches, without synonyms.",
    "words": "Lower case, without punctuation, by letters and digits.",
    "no prediction": "A video without predicted events scores 0.",
}


class Event(NamedTuple):
    """Seconds, and the words that describe what happens between them."""

    start: float
    end: float
    words: list[str]


def score(annotations: pathlib.Path, predictions: pathlib.Path, variants: Collection[str] = ()) -> Report:
    """Scores described events.

    Raises:
        DialogueError: a file cannot be read, or a record does not fit.
        ConfigError: for a variant; there are none.
    """
    rules = rules_in_force(_RULES, VARIANTS, variants)
    videos = _read_annotations(annotations)
    predicted = _read_predictions(predictions)
    parts: dict[str, list[Part]] = {"SODA_c": [], "CIDEr": [], "METEOR-stem": []}
    for video, wanted in tqdm(videos.items(), unit="video", delay=2, leave=False, dynamic_ncols=True):
        said = predicted.get(video, [])
        ious = [[interval_iou(a[:2], b[:2]) for b in wanted] for a in said]
        alike = [  # where it counts
            [meteor_stem(a.words, b.words) if iou else 0.0 for b, iou in zip(wanted, row)] for a, row in zip(said, ious)
        ]
        products = [[iou * value for iou, value in zip(*rows)] for rows in zip(ious, alike)]
        parts["SODA_c"].append((2 * best_in_order(products), len(said) + len(wanted)))
        cider_of, meteor_of = [0.0], [0.0]
        for threshold in THRESHOLDS if said else ():
            pairs, values = [], []
            for i, event in enumerate(said):
                close = [j for j, iou in enumerate(ious[i]) if iou >= threshold]
                pairs += [(event.words, wanted[j].words) for j in close] or [(event.words, _NOTHING)]
                values += [alike[i][j] for j in close] or [0.0]
            cider_of.append(sum(cider(pairs)) / len(pairs))
            meteor_of.append(sum(values) / len(values))
        parts["CIDEr"].append((sum(cider_of) / len(THRESHOLDS), 1))
        parts["METEOR-stem"].append((sum(meteor_of) / len(THRESHOLDS), 1))
    notes = note("videos left out, as the annotations lack them", [video for video in predicted if video not in videos])
    notes += note("videos without predicted events", [video for video in videos if not predicted.get(video)])
    return make_report("Dense captions", parts, rules, notes, drawn="videos")


def best_in_order(values: list[list[float]]) -> float:
    """The largest sum of values [predicted, annotated] over pairs that do not cross."""
    best = [0.0] * (len(values[0]) + 1 if values else 1)  # of the rows so far, and the first j columns
    for value in values:
        row = [0.0]
        for j, here in enumerate(value):
            row.append(max(row[j], best[j + 1], best[j] + here))
        best = row
    return best[-1]


def _read_annotations(path: pathlib.Path) -> dict[str, list[Event]]:
    videos = {}
    for video, record in object_of(read_json(path), str(path)).items():
        where = f"{path}, {video}"
        times, sentences = (list_of(object_of(record, where), key, where) for key in ("timestamps", "sentences"))
        if len(times) != len(sentences):
            raise DialogueError(f"{where}: expected a sentence a timestamp, found {len(sentences)} for {len(times)}")
        records = [{"timestamp": time, "sentence": sentence} for time, sentence in zip(times, sentences)]
        videos[video] = sorted(_event(record, where) for record in records)
    return videos


def _read_predictions(path: pathlib.Path) -> dict[str, list[Event]]:
    results = object_of(object_of(read_json(path), str(path)).get("results"), f"{path}, 'results'")
    return {
        video: sorted(
            _event(object_of(event, f"{path}, {video}"), f"{path}, {video}")
            for event in list_of(results, video, str(path))[:MAX_EVENTS]
        )
        for video in results
    }


def _event(record: Mapping[str, Any], where: str) -> Event:
    start, end = numbers(record.get("timestamp"), 2, where)
    words = words_of(text_of(record, "sentence", where))
    if len(words) > MAX_WORDS:
        raise DialogueError(f"{where}: expected at most {MAX_WORDS} words a sentence, found {len(words)}")
    return Event(start, end, words)
