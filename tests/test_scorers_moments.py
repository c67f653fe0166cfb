"""Scorers of moments in time: QVHighlights against the published metrics of Moment-DETR, and Charades-STA."""

import json

import numpy as np
import pytest

from jstream.config import ConfigError
from jstream.data.dialogue import DialogueError
from jstream.evals import charades_sta, qvhighlights, records


def lines(path, *content):
    path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------- QVHighlights, as published


@pytest.fixture(scope="session")
def moment_detr(shared_data):
    folder = shared_data / "evaluators/qvhighlights_moment_detr"
    annotations = shared_data / "annotations/qvhighlights/highlight_val_release.jsonl"
    published = json.loads((folder / "sample_val_preds_metrics_raw.json").read_text())
    return annotations, folder / "sample_val_preds.jsonl", published


def test_published_predictions_give_every_published_moment_metric(moment_detr):
    annotations, predictions, published = moment_detr
    queries = records.by_id(records.read_lines(annotations), "qid")
    found, notes = records.join(records.read_lines(predictions), "qid", queries)
    cells = qvhighlights.moments(queries, found)
    wanted = {
        (length, "mAP" if at == "average" else f"{kind}@{float(at)}"): value
        for length in qvhighlights.LENGTHS
        for kind in ("R1", "mAP")
        for at, value in published[length][f"MR-{kind}"].items()
    }
    assert len(wanted) == 84 and notes == []
    for cell, value in wanted.items():
        assert 100 * np.mean([part for part, _ in cells[cell]]) == pytest.approx(value, abs=0.0051), cell


def test_published_predictions_give_the_published_scores(moment_detr):
    annotations, predictions, published = moment_detr
    found = qvhighlights.score(annotations, predictions)
    assert found.metrics["R1@0.5"] == pytest.approx(53.94, abs=0.01)
    assert found.metrics["mAP"] == pytest.approx(32.20, abs=0.01)
    assert found.cases["R1@0.5"] == (836, 1550) and found.notes == ()
    for name in qvhighlights.SALIENCY:
        cells = published[f"HL-min-{name}"]
        assert found.metrics[f"HL-min-{name} mAP"] == pytest.approx(cells["HL-mAP"], abs=0.0051)
        assert found.metrics[f"HL-min-{name} HIT@1"] == pytest.approx(cells["HL-Hit1"], abs=0.0051)


# ----------------------------------------------------------------------------------------- QVHighlights, worked by hand

QUERY = {
    "qid": 1, "duration": 10, "relevant_windows": [[0, 4], [6, 10]],
    "relevant_clip_ids": [0, 1, 4], "saliency_scores": [[4, 2, 0], [2, 2, 0], [3, 0, 0]],
}  # fmt: skip


def qv(tmp_path, queries, *predictions):
    return qvhighlights.score(lines(tmp_path / "a.jsonl", *queries), lines(tmp_path / "p.jsonl", *predictions))


def test_a_right_window_is_found_once_and_by_score(tmp_path):
    # By score: [0, 4] hits, [0, 3.9] comes second to it, [6, 9] has an IoU of 0.75 with the other.
    windows = [[6, 9, 0.1], [0, 4, 0.9], [0, 3.9, 0.5]]
    found = qv(tmp_path, [QUERY], {"qid": 1, "pred_relevant_windows": windows}).metrics
    assert found["R1@0.5"] == found["R1@0.7"] == 100  # the first as written, not by score
    assert found["mAP@0.75"] == pytest.approx(100 * (1 / 2) * (1 + 2 / 3))
    assert found["mAP"] == pytest.approx(100 * (6 * (1 + 2 / 3) / 2 + 4 / 2) / 10)  # 0.5 … 0.75, then 0.8 … 0.95
    assert found["short mAP"] == found["mAP"] and found["long mAP"] is None  # both windows are short


def test_clips_are_ranked_by_saliency(tmp_path):
    # Fair: the first annotator has clips 0, 1 and 4, the second 0 and 1, the third none.
    found = qv(tmp_path, [QUERY], {"qid": 1, "pred_saliency_scores": [0.9, 0.1, 0.5, 0.2, 0.8]}).metrics
    first = (1 + 1 + 3 / 5) / 3  # of 0, 4, 2, 3, 1
    second = (1 + 2 / 5) / 2
    assert found["HL-min-Fair mAP"] == pytest.approx(100 * (first + second + 0) / 3)
    assert found["HL-min-VeryGood mAP"] == pytest.approx(100 / 3) and found["HL-min-Fair HIT@1"] == 100
    assert list(found) == [f"HL-min-{name} {what}" for name in qvhighlights.SALIENCY for what in ("mAP", "HIT@1")]


def test_a_query_without_a_record_scores_nothing_and_is_told_of(tmp_path):
    record = {"qid": 1, "pred_relevant_windows": [[0, 4, 1]]}
    found = qv(tmp_path, [QUERY, QUERY | {"qid": 2}], record, record, record | {"qid": 3})
    assert found.cases["R1@0.5"] == (1, 2)
    assert found.notes == (
        "records left out, as the annotations lack their id: 1 (3)",
        "records left out, as not the first with their id: 1 (1)",
        "questions without a record: 1 (2)",
    )


@pytest.mark.parametrize(
    ("query", "prediction", "said"),
    [
        ({}, {"qid": 1}, "expected 'pred_relevant_windows' or 'pred_saliency_scores', found neither"),
        ({}, {"qid": 1, "pred_relevant_windows": 3}, "p.jsonl, line 1: expected a list under 'pred_relevant_windows'"),
        ({}, {"qid": 1, "pred_relevant_windows": [[1, 2]]}, r"line 1: expected a list of 3 numbers, found \[1, 2\]"),
        ({}, {"qid": 1, "pred_relevant_windows": [[1, 2, float("nan")]]}, "line 1: expected a number, found nan"),
        ({}, {"qid": 1, "pred_saliency_scores": ["x"]}, "line 1: expected a number, found 'x'"),
        ({}, {"qid": None, "pred_relevant_windows": []}, "line 1: expected an id"),
        ({"relevant_clip_ids": [0, 1, 99]}, {"qid": 1, "pred_saliency_scores": [1]}, "a.jsonl, line 1: expected a sal"),
        ({"relevant_windows": None}, {"qid": 1, "pred_relevant_windows": []}, "a.jsonl, line 1: expected a list under"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, query, prediction, said):
    with pytest.raises(DialogueError, match=said) as caught:
        qv(tmp_path, [QUERY | query], prediction)
    assert "\n" not in str(caught.value)


def test_there_are_no_variants(moment_detr):
    with pytest.raises(ConfigError, match="expected none, found 'letters'"):
        qvhighlights.score(*moment_detr[:2], variants=["letters"])


# --------------------------------------------------------------------------------------------------------- Charades-STA


def test_the_right_spans_of_charades_sta_score_all_but_the_empty_ones(shared_data, tmp_path):
    annotations = shared_data / "annotations/charades_sta/charades_sta_test.txt"
    spans = [[float(word) for word in line.split("##")[0].split()[1:]] for line in annotations.open()]
    predictions = lines(tmp_path / "p.jsonl", *({"id": i, "span": span} for i, span in enumerate(spans, start=1)))
    found = charades_sta.score(annotations, predictions)
    assert found.cases["R1@0.7"] == (3720, 3720) and found.metrics["mIoU"] == 100 and found.notes == ()
    halves = ({"id": i, "span": [start, (start + end) / 2]} for i, (start, end) in enumerate(spans, start=1))
    found = charades_sta.score(annotations, lines(tmp_path / "p.jsonl", *halves))
    assert (
        found.metrics["mIoU"] == pytest.approx(50) and found.metrics["R1@0.3"] == 100 and found.metrics["R1@0.7"] == 0
    )


def charades(tmp_path, text, *predictions):
    (tmp_path / "a.txt").write_text(text)
    return charades_sta.score(tmp_path / "a.txt", lines(tmp_path / "p.jsonl", *predictions))


def test_a_sentence_without_a_span_has_no_overlap(tmp_path):
    text = "A 0 4##One.\n\nB 0 4##Two ## three.\nC 4 4##Empty.\n"
    found = charades(tmp_path, text, {"id": 1, "span": [1, 4]}, {"id": 3, "span": None}, {"id": 2, "span": [0, 4]})
    assert found.cases == {"R1@0.3": (1, 3), "R1@0.5": (1, 3), "R1@0.7": (1, 3), "mIoU": (0.75, 3)}
    assert found.notes == (
        "records left out, as the annotations lack their id: 1 (2)",
        "questions without a record: 1 (4)",
    )


@pytest.mark.parametrize(
    ("text", "prediction", "said"),
    [
        ("A 0 4 One.", {"id": 1}, "a.txt, line 1: expected VIDEO START END##SENTENCE, found 'A 0 4 One.'"),
        ("A 0 x##One.", {"id": 1}, "a.txt, line 1: expected VIDEO START END##SENTENCE"),
        ("A 0 nan##One.", {"id": 1}, "a.txt, line 1: expected VIDEO START END##SENTENCE"),
        ("A 0 4##One.", {"id": 1, "span": [1]}, "p.jsonl, line 1: expected a list of 2 numbers"),
        ("A 0 4##One.", {"id": 1, "span": "1-2"}, "p.jsonl, line 1: expected a list of 2 numbers, found '1-2'"),
    ],
)
def test_spans_that_do_not_fit_are_one_line(tmp_path, text, prediction, said):
    with pytest.raises(DialogueError, match=said):
        charades(tmp_path, text, prediction)
