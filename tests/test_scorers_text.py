"""Scorers of texts: COIN on its real test videos."""

import collections
import functools
import json

import numpy as np
import pytest

from jstream.data.dialogue import DialogueError
from jstream.evals import coin


def lines(path, *content):
    path.write_text("".join(json.dumps(line) + "\n" for line in content), encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------- COIN


@pytest.fixture(scope="session")
def coin_json(shared_data):
    """The test videos in the form of the official `coin.json`, with the texts of their steps; their tasks by number."""
    folder = shared_data / "annotations/coin"
    texts = (folder / "step_coin_text.txt").read_text().splitlines()
    videos = {line.split()[0]: {"class": f"DoTask{line.split()[1]}", "annotation": [], "subset": "testing"}
              for line in (folder / "coin_task_test.csv").open()}  # fmt: skip
    for line in (folder / "coin_step_test.csv").open():
        video, step, _, start, end = line.split()
        label = {"label": texts[int(step)], "segment": [float(start), float(end)]}
        videos.setdefault(video, {"class": "DoTask0", "annotation": [], "subset": "testing"})["annotation"].append(
            label
        )
    return {"database": videos | {"seen": {"class": "X", "subset": "training", "annotation": []}}}


def coin_of(tmp_path, content, *predictions, **options):
    (tmp_path / "coin.json").write_text(json.dumps(content))
    return coin.score(tmp_path / "coin.json", lines(tmp_path / "p.jsonl", *predictions), **options)


def test_right_replies_about_the_test_videos_score_100(coin_json, tmp_path):
    def replies():
        for video, record in coin_json["database"].items():
            if record["subset"] == "training":
                continue
            yield f"task/{video}", record["class"].replace("DoTask", "Do task") + "."
            steps = [step["label"].capitalize() + "." for step in record["annotation"]]
            for i, step in enumerate(steps):
                yield f"step/{video}/{i}", step
                after = steps[i + 1 : i + 6]
                if after:
                    yield f"next/{video}/{i}", after[0]
                    many = "\n".join(f"{j}. {text}" for j, text in enumerate(after, start=1))
                    yield f"proc/{video}/{i}", after[0] if len(after) == 1 else many
                    yield f"proc+/{video}/{i}", many

    found = coin_of(tmp_path, coin_json, *({"id": name, "response": text} for name, text in replies()))
    assert set(found.metrics.values()) == {100} and found.notes == ()
    counts = collections.Counter(len(record["annotation"]) for record in coin_json["database"].values())
    assert found.cases["step"] == (10099, 10099)
    assert found.cases["next"][1] == sum(max(steps - 1, 0) * videos for steps, videos in counts.items())
    after = lambda steps: sum(min(5, steps - 1 - i) for i in range(steps - 1))
    assert found.cases["proc"][1] == sum(after(steps) * videos for steps, videos in counts.items())


KITCHEN = {
    "database": {
        "v": {
            "class": "PutOnHair",
            "subset": "testing",
            "annotation": [{"label": x} for x in ("cut it", "Fold it", "glue")],
        },
        "w": {"class": "ReplaceSIMCard", "subset": "testing", "annotation": [{"label": "process (crop, fold) paper"}]},
    }
}


@pytest.mark.parametrize(
    ("name", "response", "right"),
    [
        ("step/v/0", "Cut it.", 1), ("step/v/0", " CUT it \nGlue", 1), ("step/v/0", "cut them", 1),
        ("step/v/0", "hold it", 0), ("step/v/0", "", 0), ("step/w/0", "Crop and fold paper.", 1), ("task/v", "Put on hair", 1),
        ("task/w", "replace the sim card", 1), ("next/v/0", "1. Fold it.", 1), ("next/v/1", "Fold it.", 0),
    ],
)  # fmt: skip
def test_a_reply_is_taken_as_the_nearest_category(tmp_path, name, response, right):
    found = coin_of(tmp_path, KITCHEN, {"id": name, "response": response}, variants=["skip_missing"])
    assert found.cases[name.partition("/")[0]] == (right, 1)


def test_steps_to_come_are_counted_in_order_and_missing_ones_are_wrong(tmp_path):
    record = {"id": "proc/v/0", "response": "1. Glue.\n2. Glue."}
    found = coin_of(tmp_path, KITCHEN, record)
    assert found.cases["proc"] == (1, 3) and found.notes == ("1 questions without a record: proc/v/1",)
    assert found.metrics["step"] is found.metrics["proc+"] is None  # nothing was answered
    record["response"] = "Fold it"
    assert coin_of(tmp_path, KITCHEN, record).cases["proc"] == (1, 3)
    assert coin_of(tmp_path, KITCHEN, record, variants=["skip_missing"]).cases["proc"] == (1, 1)


def test_the_nearest_category_is_that_of_the_least_edit_distance():
    def distance(a, b):
        @functools.cache
        def d(i, j):
            if not i or not j:
                return i + j
            return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

        return d(len(a), len(b))

    rng = np.random.Generator(np.random.PCG64(0))
    word = lambda: "".join(rng.choice(list("abc "), rng.integers(0, 9)))
    categories = sorted({word() for _ in range(30)})
    nearest = coin.nearest_of(categories)
    for _ in range(100):
        text = word()
        assert nearest(text) == min(categories, key=lambda c: (distance(text, c), c))


@pytest.mark.parametrize(
    ("content", "prediction", "said"),
    [
        ([], {}, r"coin.json: expected an object, found \[\]"),
        ({"database": {}}, {"id": "step/v/0"}, "coin.json: expected videos of a test subset, found none of 0"),
        (
            {"database": {"v": {"subset": "testing", "class": "A"}}},
            {"id": ""},
            "coin.json, v: expected a list under 'ann",
        ),
        (KITCHEN, {"id": "step/v/0"}, "p.jsonl, line 1: expected text under 'response', found None"),
        (KITCHEN, {"response": ""}, "p.jsonl, line 1: expected an id"),
    ],
)
def test_texts_that_do_not_fit_are_one_line(tmp_path, content, prediction, said):
    with pytest.raises(DialogueError, match=said):
        coin_of(tmp_path, content, prediction)


def test_unknown_questions_are_told_of(tmp_path):
    found = coin_of(tmp_path, KITCHEN, {"id": "step/v/9", "response": ""}, {"id": "what", "response": ""})
    assert found.notes[0] == "2 records left out: the annotations lack their id: step/v/9, what"
