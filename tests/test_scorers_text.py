"""Scorers of texts: COIN on its real test videos, and dense captions on cases worked by hand."""

import collections
import functools
import json

import numpy as np
import pytest

from jstream.data.dialogue import DialogueError
from jstream.evals import coin, dense_captions
from jstream.evals.caption_scores import cider, meteor_stem, words_of
from jstream.evals.stemming import stem


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
        ("step/v/0", "hold it", 0), ("step/v/0", "", 0), ("step/w/0", "Crop and fold paper.", 1),
        ("task/v", "Put on hair", 1), ("task/w", "replace the sim card", 1), ("next/v/0", "1. Fold it.", 1),
        ("next/v/1", "Fold it.", 0),
    ],
)  # fmt: skip
def test_a_reply_is_taken_as_the_nearest_category(tmp_path, name, response, right):
    found = coin_of(tmp_path, KITCHEN, {"id": name, "response": response}, variants=["skip_missing"])
    assert found.cases[name.partition("/")[0]] == (right, 1)


def test_steps_to_come_are_counted_in_order_and_missing_ones_are_wrong(tmp_path):
    record = {"id": "proc/v/0", "response": "1. Glue.\n2. Glue."}
    found = coin_of(tmp_path, KITCHEN, record)
    assert found.cases["proc"] == (1, 3) and found.notes == ("questions without a record: 1 (proc/v/1)",)
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
    assert found.notes[0] == "records left out, as the annotations lack their id: 2 (step/v/9, what)"


# --------------------------------------------------------------------------------------------- what captions have alike


@pytest.mark.parametrize(
    ("word", "expected"),
    [  # of the paper's own examples for its steps
        ("caresses", "caress"), ("ponies", "poni"), ("ties", "ti"), ("cats", "cat"), ("feed", "feed"),
        ("agreed", "agre"), ("plastered", "plaster"), ("bled", "bled"), ("motoring", "motor"), ("sing", "sing"),
        ("conflated", "conflat"), ("troubled", "troubl"), ("sized", "size"), ("hopping", "hop"), ("falling", "fall"),
        ("hissing", "hiss"), ("failing", "fail"), ("filing", "file"), ("happy", "happi"), ("sky", "sky"),
        ("relational", "relat"), ("vietnamization", "vietnam"), ("hopefulness", "hope"), ("triplicate", "triplic"),
        ("electrical", "electr"), ("revival", "reviv"), ("adoption", "adopt"), ("adjustment", "adjust"),
        ("probate", "probat"), ("rate", "rate"), ("cease", "ceas"), ("controll", "control"), ("roll", "roll"),
        ("oscillators", "oscil"), ("is", "is"), ("7s", "7s"),
    ],
)  # fmt: skip
def test_words_have_the_stems_that_porter_gives(word, expected):
    assert stem(word) == expected


def test_words_of_a_caption_have_no_case_and_no_punctuation():
    assert words_of("Don't  STOP, it's 7 o'clock — Größe!") == ["don't", "stop", "it's", "7", "o'clock", "grösse"]


def test_meteor_prefers_recall_and_few_chunks():
    of = lambda a, b: meteor_stem(a.split(), b.split())
    assert of("cut the onion", "cut the onion") == pytest.approx(1 - 0.5 / 27)
    assert of("cuts the onions", "cutting the onion") == pytest.approx(1 - 0.5 / 27)
    assert of("a b c", "c b a") == pytest.approx(1 - 0.5)  # three chunks of three
    f_mean = 10 * (2 / 4) * (2 / 3) / (2 / 3 + 9 * 2 / 4)
    assert of("x a b y", "a z b") == pytest.approx(f_mean * (1 - 0.5 * (2 / 2) ** 3))
    assert of("the the the", "the cat") == pytest.approx(10 * (1 / 3) * (1 / 2) / (1 / 2 + 9 / 3) * 0.5)
    assert of("a", "b") == of("", "a") == of("a", "") == 0


def test_cider_of_two_pairs_by_hand():
    # Every n-gram is in one of two references: all weigh log 2, and cosines are those of counts.
    pairs = [("a b c d".split(), "a b c d".split()), ("e f".split(), "e g".split())]
    same, half = cider(pairs)
    assert same == pytest.approx(10)
    assert half == pytest.approx(
        10 / 4 * (1 / 2)
    )  # e of two words; f is in no reference, and weighs as one that is in one
    longer = cider([("a b c d d".split(), "a b c d".split()), pairs[1]])[0]
    one, two, three, four = 4 / (7**0.5 * 2), 3 / (4 * 3) ** 0.5, 2 / (3 * 2) ** 0.5, 1 / 2**0.5
    weight = np.exp(-1 / 72)  # one bigram longer, sigma 6
    assert longer == pytest.approx(10 * (one + two + three + four) / 4 * weight)
    assert cider([("a b".split(), "a b".split())]) == [0]  # a pair alone


# ------------------------------------------------------------------------------------------------------- dense captions


def dense(tmp_path, annotations, results):
    paths = tmp_path / "a.json", tmp_path / "p.json"
    for path, content in zip(paths, (annotations, {"version": "1", "results": results})):
        path.write_text(json.dumps(content))
    return dense_captions.score(*paths)


def annotated(*events):
    return {"duration": 100, "timestamps": [list(e[:2]) for e in events], "sentences": [e[2] for e in events]}


def said(*events):
    return [{"timestamp": list(e[:2]), "sentence": e[2]} for e in events]


def test_real_recipes_said_right_score_all_that_there_is(shared_data, tmp_path):
    annotations = json.loads((shared_data / "annotations/youcook2/yc2_val.json").read_text())
    annotations = dict(list(annotations.items())[:100])
    results = {
        video: said(*((*time, text) for time, text in zip(record["timestamps"], record["sentences"])))
        for video, record in annotations.items()
    }
    found = dense(tmp_path, annotations, results)
    words = [words_of(text) for record in annotations.values() for text in record["sentences"]]
    best = [meteor_stem(text, text) for text in words]  # a little less than 1, the more so the shorter
    assert found.metrics["SODA_c"] == pytest.approx(100 * np.mean(best))
    assert 95 < found.metrics["METEOR-stem"] < 100 and found.metrics["CIDEr"] > 700 and found.notes == ()
    shuffled = {video: results[other] for video, other in zip(results, list(results)[1:] + list(results)[:1])}
    wrong = dense(tmp_path, annotations, shuffled).metrics
    assert all(value < 0.15 * found.metrics[name] for name, value in wrong.items())


def test_events_are_paired_in_order_of_time(tmp_path):
    annotations = {"v": annotated((0, 10, "cut it"), (10, 20, "fold it"), (50, 60, "glue it"))}
    same = meteor_stem(["cut", "it"], ["cut", "it"])
    found = dense(tmp_path, annotations, {"v": said((10, 20, "fold it"), (0, 5, "cut it"))})
    assert found.metrics["SODA_c"] == pytest.approx(100 * 2 * (same + same / 2) / 5)
    crossed = dense(tmp_path, annotations, {"v": said((0, 20, "fold it"), (1, 21, "cut it"))})
    values = [[0.5 * meteor_stem(["fold", "it"], [w, "it"]) for w in ("cut", "fold")],
              [9 / 21 * same, 10 / 21 * meteor_stem(["cut", "it"], ["fold", "it"])]]  # fmt: skip
    best = max(values[0][0] + values[1][1], values[0][1], values[1][0])
    assert crossed.metrics["SODA_c"] == pytest.approx(100 * 2 * best / 5)


def test_captions_are_compared_where_events_overlap_enough(tmp_path):
    # IoU 0.6 with the first: compared at 0.3 and 0.5; nothing at 0.7 and 0.9. The second overlaps none.
    annotations = {"v": annotated((0, 10, "cut it")), "w": annotated((0, 10, "cut it"))}
    found = dense(tmp_path, annotations, {"v": said((0, 6, "cut it"), (20, 30, "cut it"))})
    same = meteor_stem(["cut", "it"], ["cut", "it"])
    assert found.metrics["METEOR-stem"] == pytest.approx(100 * (same / 2) * (2 / 4) / 2)  # of two videos
    assert found.metrics["CIDEr"] == pytest.approx(100 * (10 * 2 / 4 / 2) * (2 / 4) / 2)  # of n-grams, only 1 and 2
    assert found.metrics["SODA_c"] == pytest.approx(100 * 2 * 0.6 * same / (3 + 1))
    assert found.notes == ("videos without predicted events: 1 (w)",)


def test_videos_that_are_not_annotated_are_told_of(tmp_path):
    found = dense(tmp_path, {"v": annotated((0, 1, "x"))}, {"w": []})
    assert found.notes == (
        "videos left out, as the annotations lack them: 1 (w)",
        "videos without predicted events: 1 (v)",
    )
    assert found.metrics == {"SODA_c": 0, "CIDEr": 0, "METEOR-stem": 0}


@pytest.mark.parametrize(
    ("annotations", "results", "text"),
    [
        ([], {}, r"a.json: expected an object, found \[\]"),
        (
            {"v": {"timestamps": [[0, 1]], "sentences": []}},
            {},
            "a.json, v: expected a sentence a timestamp, found 0 for 1",
        ),
        ({"v": annotated((0, "1", "x"))}, {}, "a.json, v: expected a number, found '1'"),
        ({}, {"v": {}}, "p.json: expected a list under 'v', found {}"),
        ({}, {"v": [{"timestamp": [0, 1]}]}, "p.json, v: expected text under 'sentence', found None"),
        ({}, {"v": said((0, 1, "x " * 201))}, "p.json, v: expected at most 200 words a sentence, found 201"),
        ({}, None, "p.json, 'results': expected an object, found None"),
    ],
)
def test_captions_that_do_not_fit_are_one_line(tmp_path, annotations, results, text):
    with pytest.raises(DialogueError, match=text):
        dense(tmp_path, annotations, results)
