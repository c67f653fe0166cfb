"""Annotation files of others: every record is kept, repaired by a rule or dropped with a reason, and said in time."""

import collections
import csv
import json
import math

import numpy as np
import pytest

from jstream.data.dialogue import DialogueError, Response, dialogue_from_raw, dialogue_to_raw, read_raw
from jstream.data.sources import SOURCES, choices, clip, ovo_bench, streamo
from jstream.data.sources.clip import Clip, Counts, Event, Question, repair
from jstream.data.sources.files import seconds
from jstream.data.sources.tasks import TASKS, dialogues_of, lanes
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY, span_in
from jstream.protocols.streamo import to_stream_format, turns_of

NAN = math.nan


def write(path, content):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def records_of(source, path):
    return [record for found in SOURCES[source].read(path) for record in found.records]


def repaired(source, path):
    """The clips that are left, and the counts."""
    counts = Counts()
    clips = [repair(found, counts) for found in SOURCES[source].read(path)]
    assert counts.kept + counts.repaired + sum(counts.dropped.values()) == counts.total
    assert all(number <= counts.repaired for number in counts.repairs.values())
    return clips, counts


def replies_of(dialogue, fps=1.0):
    """(frame, reply) where the dialogue is laid over its video."""
    turns = turns_of(dialogue, math.ceil((dialogue.duration - 0.001) * fps), fps)
    return [(frame, turn.reply) for frame, turn in enumerate(turns) if turn.reply is not None]


# ------------------------------------------------------------------------------------------------------- real files


def flat(items):
    for item in items:
        yield from flat(item) if isinstance(item, list) else [item]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def dense(path):
    return sum(len(record["timestamps"]) for record in load(path).values())


def lines(path):
    return len(path.read_text().splitlines())


def windows(path):
    return sum(len(json.loads(line)["relevant_windows"]) for line in path.read_text().splitlines())


def questions(path):
    return sum(len(record["questions"]) for record in flat(load(path)))


def items(path):
    return sum(len(item.get("all_steps", [0])) for item in load(path))


# Every annotation file, with its records counted another way.
FILES = [
    ("activitynet_captions", "activitynet_captions/train_modified.json", dense, 37421),
    ("charades_sta", "charades_sta/charades_sta_test.txt", lines, 3720),
    ("charades_sta", "charades_sta/charades_sta_train.txt", lines, 12408),
    ("coin", "coin/coin_next_test.csv", lines, 6721),
    ("coin", "coin/coin_step_test.csv", lines, 10099),
    ("coin", "coin/coin_step_train.csv", lines, 32905),
    ("coin", "coin/coin_task_test.csv", lines, 2594),
    ("epic_kitchens", "epic_kitchens_100/EPIC_100_validation.csv", lambda path: lines(path) - 1, 9668),
    ("ovo_bench", "ovo_bench/ovo_bench_new.json", items, 1640 - 42 + 145),  # 42 items of SSR have 145 steps
    ("qvhighlights", "qvhighlights/highlight_val_release.jsonl", windows, 2803),
    ("streamingbench", "streamingbench/questions_omni.json", questions, 1500),
    ("streamingbench", "streamingbench/questions_proactive.json", questions, 250),
    ("streamingbench", "streamingbench/questions_real.json", questions, 2500),
    ("streamingbench", "streamingbench/questions_sqa.json", questions, 250),
    ("streamo", "streamo/raw_data.json", lambda path: len(load(path)), 2),
    ("streamo", "streamo/stream_format.json", lambda path: len(load(path)), 2),
    ("youcook2", "youcook2/yc2_train.json", dense, 10337),
    ("youcook2", "youcook2/yc2_val.json", dense, 3492),
]


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "annotations"


@pytest.mark.parametrize(("source", "name", "count", "number"), FILES, ids=[name for _, name, _, _ in FILES])
def test_every_record_of_every_file_is_kept_repaired_or_dropped(folder, source, name, count, number):
    clips, counts = repaired(source, folder / name)
    assert counts.total == count(folder / name) == number
    assert sum(len(one.records) for one in clips) == counts.kept + counts.repaired
    for one in clips[::25]:
        for task in SOURCES[source].tasks:
            for dialogue in dialogues_of(one, task, source):
                assert dialogue_from_raw(dialogue_to_raw(dialogue)) == dialogue


def test_the_faults_of_activitynet_are_the_known_ones(folder):
    path = folder / "activitynet_captions/train_modified.json"
    clips, counts = repaired("activitynet_captions", path)
    assert counts.dropped == {clip.EMPTY: 2} and len(clips) == 10009
    leading = [text for record in load(path).values() for text in record["sentences"] if text != text.strip()]
    assert len(leading) == 25731  # two of them are of the events without a length
    assert counts.repairs == {clip.OUTER_BLANKS: 25729, clip.INNER_BLANKS: 322, clip.LATE: 29}
    assert list(counts.videos.values()) == [10009, 545, 5703]  # in all, out of order, with overlaps


def test_the_faults_of_the_other_files_are_the_known_ones(folder):
    repairs = lambda source, name: repaired(source, folder / name)[1].repairs
    dropped = lambda source, name: repaired(source, folder / name)[1].dropped
    assert dropped("charades_sta", "charades_sta/charades_sta_train.txt") == {clip.EMPTY: 4}
    assert repairs("coin", "coin/coin_step_train.csv")[clip.LATE] == 1
    assert repairs("coin", "coin/coin_step_test.csv")[clip.LATE] == 0
    assert not dropped("youcook2", "youcook2/yc2_train.json") and not dropped("youcook2", "youcook2/yc2_val.json")
    assert sum(dropped("coin", "coin/coin_task_test.csv").values()) == 2594  # tasks of whole videos, and no steps
    # One of the 420 stands in the file twice.
    assert repairs("ovo_bench", "ovo_bench/ovo_bench_new.json")[ovo_bench.OTHER_WORDS] == 420 - 1
    assert dropped("ovo_bench", "ovo_bench/ovo_bench_new.json") == {clip.AGAIN: 3}
    assert repairs("streamingbench", "streamingbench/questions_omni.json")[choices.JOINED] == 9
    assert dropped("streamingbench", "streamingbench/questions_omni.json") == {choices.TWICE: 3}
    assert repairs("streamingbench", "streamingbench/questions_sqa.json")[choices.LETTERED] == 100
    assert not dropped("streamingbench", "streamingbench/questions_real.json")  # stray keys do not matter


def test_the_last_words_of_a_video_are_said(folder):
    """In most videos of ActivityNet a sentence lasts to the end, where a reply in the turn after would be lost."""
    clips, _ = repaired("activitynet_captions", folder / "activitynet_captions/train_modified.json")
    at_the_end = 0
    for one in clips[::40]:
        texts = collections.Counter(event.text for event in one.records)
        at_the_end += max(event.end for event in one.records) > math.ceil(one.duration) - 1
        for task in ("narration", "event_caption"):
            [dialogue] = dialogues_of(one, task)
            said = " ".join(reply for _, reply in replies_of(dialogue))
            assert (
                all(text in said for text in texts)
                and len(said) == sum(len(text) * number for text, number in texts.items()) + sum(texts.values()) - 1
            )
    assert at_the_end > 100


def test_durations_apart_make_the_late_ends_of_charades_known(folder):
    with (folder / "charades_sta/Charades_v1_test.csv").open() as file:
        durations = {row["id"]: float(row["length"]) for row in csv.DictReader(file)}
    counts = Counts()
    for found in SOURCES["charades_sta"].read(folder / "charades_sta/charades_sta_test.txt"):
        assert found.duration is None
        repair(Clip(found.video, durations[found.video], found.records), counts)
    assert counts.repairs[clip.LATE] == 562 and not counts.dropped


def test_all_windows_of_a_query_are_answered(folder):
    clips, _ = repaired("qvhighlights", folder / "qvhighlights/highlight_val_release.jsonl")
    asked = [query.text for one in clips for d in dialogues_of(one, "grounding") for query in d.queries]
    assert len(asked) == 1550
    texts = collections.Counter((one.video, event.text) for one in clips for event in one.records)
    [((video, text), number)] = texts.most_common(1)
    [one] = [one for one in clips if one.video == video]
    windows = [(event.start, event.end) for event in one.records if event.text == text]
    [dialogue] = [d for d in dialogues_of(one, "grounding") if any(text.rstrip(".") in q.text for q in d.queries)]
    assert len(dialogue.queries) == 1 and len(windows) == number == 25
    assert [span_in(reply) for _, reply in replies_of(dialogue)] == windows


def test_streamos_two_formats_hold_the_same_dialogues(folder):
    raw, _ = repaired("streamo", folder / "streamo/raw_data.json")
    stream, counts = repaired("streamo", folder / "streamo/stream_format.json")
    assert counts.repairs == {streamo.LEAKED: 2}  # the question is not known before it is asked
    [*from_raw], [*from_stream] = (
        [d for one in clips for d in dialogues_of(one, "as_published")] for clips in (raw, stream)
    )
    assert [(d.queries, d.responses, d.task, d.source) for d in from_raw] == [
        (d.queries, d.responses, d.task, d.source) for d in from_stream
    ]
    assert {d.duration for d in from_stream} == {76}
    assert from_raw == list(read_raw(folder / "streamo/raw_data.json"))
    published = load(folder / "streamo/stream_format.json")
    assert [to_stream_format(dialogue, 76, official=True) for dialogue in from_raw] == published


def test_choices_are_asked_with_their_letters(folder):
    for name, number in (("real", 2500), ("omni", 1497), ("sqa", 249)):
        clips, _ = repaired("streamingbench", folder / f"streamingbench/questions_{name}.json")
        asked = [question for one in clips for question in one.records]
        assert len(asked) == number
        for question in asked:
            *_, a, b, c, d, instruction = question.text.split("\n")
            assert instruction == choices.INSTRUCTION
            assert [line[:3] for line in (a, b, c, d)] in (["A. ", "B. ", "C. ", "D. "], ["C. ", "D. ", "E. ", "F. "])
            [answer] = question.answers
            assert answer.text in "ABCD" and f"\n{answer.text}. " in question.text and not question.waits


def test_sequential_questions_follow_each_other_in_one_dialogue(folder):
    clips, _ = repaired("streamingbench", folder / "streamingbench/questions_sqa.json")
    [dialogue] = dialogues_of(clips[0], "qa", "streamingbench")
    assert [query.time for query in dialogue.queries] == [36, 182, 298, *[q.time for q in dialogue.queries[3:]]]
    assert [response.time for response in dialogue.responses] == [query.time for query in dialogue.queries]
    assert dialogue.responses[0].text == "A" and "\nB. Fan Z.D.\n" in dialogue.queries[0].text


def test_proactive_answers_wait_for_their_clue(folder):
    clips, _ = repaired("streamingbench", folder / "streamingbench/questions_proactive.json")
    scoreboard = clips[0].records[0]
    assert (scoreboard.time, scoreboard.answers) == (20.0, (Event("3", None, 29.0),))
    dialogue = dialogues_of(clips[0], "time_sensitive_qa")[0]
    turns = turns_of(dialogue, 40)
    assert turns[19].query == 'When the scoreboard shows 3 points for USA, output "3".'
    assert [i for i, turn in enumerate(turns) if turn.reply == "3"] == [29]  # the frame of second 29, and none before
    said = [r for one in clips for d in dialogues_of(one, "time_sensitive_qa") for r in d.responses]
    assert len(said) == 249  # the other is known when it is asked


def test_ovo_bench_asks_what_its_tasks_ask(folder):
    clips, _ = repaired("ovo_bench", folder / "ovo_bench/ovo_bench_new.json")
    kinds = collections.Counter()
    for one in clips:
        for record in one.records:
            kinds["step" if isinstance(record, Event) else "later" if record.waits else "now"] += 1
    assert kinds == {"step": 145, "later": 82 + 48, "now": 1468 - 3}
    raw = {item["id"]: item for item in load(folder / "ovo_bench/ovo_bench_new.json")}
    breaking = next(q for one in clips for q in one.records if "breaking something" in q.text)
    assert breaking.answers == (Event("1", None, 17.0),) and raw[1558]["end_times"] == [17]
    black_coat = next(q for one in clips for q in one.records if q.text.startswith("The woman in a black coat walks"))
    assert (black_coat.time, black_coat.answers[0].end) == (raw[1468]["ask_time"], raw[1468]["clue_time"]) == (297, 308)


def test_epic_kitchens_narrates_when_an_action_is_over(folder):
    clips, _ = repaired("epic_kitchens", folder / "epic_kitchens_100/EPIC_100_validation.csv")
    first = next(one for one in clips if one.video == "P01_11")
    assert first.records[0] == Event("take plate", 0.0, 1.89)
    [dialogue] = dialogues_of(first, "narration", "epic_kitchens")
    assert dialogue.responses[0] == Response("take plate", time=2.89)
    assert len(dialogue.responses) == len(first.records)


def test_coin_has_its_words_beside_it(folder, tmp_path):
    [first, *_], _ = repaired("coin", folder / "coin/coin_step_train.csv")
    assert first.video == "eD6NEcqcCyc.mkv" and first.duration == 158.894144
    assert (first.records[0].start, first.records[0].end) == (17.5, 30.5)
    words = (folder / "coin/step_coin_text.txt").read_text().splitlines()
    assert first.records[0].text == " ".join(words[74].split())
    rows = write(tmp_path / "steps.csv", "a.mp4 0 10.0 1.0 2.0\na.mp4 9 10.0 3.0 4.0\na.mp4 x 10 3 4\n")
    with pytest.raises(DialogueError, match="step_coin_text.txt: expected annotations, found: No such file"):
        list(SOURCES["coin"].read(rows))
    write(tmp_path / "step_coin_text.txt", "cut\n")
    [one], counts = repaired("coin", rows)
    assert one.records == (Event("cut", 1.0, 2.0),) and counts.dropped == {clip.NO_TEXT: 2}


# ------------------------------------------------------------------------------------------ made up to their schemas


def test_activitynet_that_lacks_times_or_sentences(tmp_path):
    video = {
        "duration": 10,
        "timestamps": [[0, 1], [2, 3], ["x", 4], 7, [5]],
        "sentences": ["a", None, "c", "d", "e", "f"],
    }
    [one], counts = repaired("activitynet_captions", write(tmp_path / "a.json", {"v": video}))
    assert one == Clip("v", 10, (Event("a", 0, 1),))
    assert counts.dropped == {clip.NO_TEXT: 1, clip.NO_TIME: 4}


def test_youcook2_and_coin_as_published(tmp_path):
    recipe = {"duration": 241.62, "annotations": [{"segment": [90, 102], "id": 0, "sentence": "spread it"}]}
    path = write(tmp_path / "y.json", {"database": {"GLd3aX16zBg": recipe}})
    assert list(SOURCES["youcook2"].read(path)) == [Clip("GLd3aX16zBg", 241.62, (Event("spread it", 90, 102),))]
    steps = {"duration": 60, "class": "X", "annotation": [{"id": "7", "segment": [1.5, 3], "label": "cut"}]}
    path = write(tmp_path / "c.json", {"database": {"a": steps}})
    assert list(SOURCES["coin"].read(path)) == [Clip("a", 60, (Event("cut", 1.5, 3),))]


def test_didemo_takes_what_most_annotators_say(tmp_path):
    moments = [
        {"video": "a.avi", "description": "a dog jumps", "times": [[2, 3], [1, 1], [1, 1], [0, 1]], "num_segments": 6},
        {"video": "a.avi", "description": "it sits", "times": [[5, 5], [4, 5], [4, 4], [3, 3]]},
        {"video": "b.mov", "description": "none", "times": []},
        {"video": "b.mov", "description": "backwards", "times": [[3, 1]]},
    ]
    path = write(tmp_path / "d.json", moments)
    assert [event.fault for event in records_of("didemo", path)][2] == "no annotator gave a time"
    first, second = repaired("didemo", path)[0]
    assert first.records == (Event("a dog jumps", 5, 10), Event("it sits", 25, 30)) and second.records == ()
    counts = Counts()  # its last chunk is as long as the video lasts
    assert repair(Clip("a.avi", 28.2, first.records), counts).records[1] == Event("it sits", 25, 28.2)
    assert counts.repairs == {clip.LATE: 1}


def test_hirest_has_steps_under_prompts(tmp_path):
    steps = [{"index": 0, "heading": "heat oil ", "absolute_bounds": [75, 82]}]
    videos = {
        "a.mp4": {"relevant": True, "v_duration": 301.1, "bounds": [75, 246], "steps": steps},
        "b.mp4": {"steps": []},
    }
    clips, counts = repaired("hirest", write(tmp_path / "h.json", {"Make beets": videos}))
    assert clips == [Clip("a.mp4", 301.1, (Event("heat oil", 75, 82),))] and counts.repairs == {clip.OUTER_BLANKS: 1}


def test_ego4d_narrations_of_two_passes_are_two_dialogues(tmp_path):
    said = lambda time, text: {
        "timestamp_sec": time,
        "narration_text": text,
        "timestamp_frame": 0,
        "annotation_uid": "u",
    }
    one = {"narrations": [said(3.34, "#C C picks a bag"), said(9, "#O a man X waves #unsure"), said(7, "#C C sits")]}
    content = {"uid": {"narration_pass_1": one, "narration_pass_2": {"narrations": [said(3, "#O man X waves")]}}}
    for path in (write(tmp_path / "a.json", content), write(tmp_path / "b.json", {"videos": content})):
        clips, counts = repaired("ego4d_narration", path)
        assert [[(e.text, e.end) for e in found.records] for found in clips] == [
            [("C picks a bag", 3.34), ("C sits", 7)],
            [("man X waves", 3)],
        ]
        assert sum(counts.dropped.values()) == 1 and not counts.repairs
    [dialogue] = dialogues_of(clips[0], "narration")
    turns = turns_of(dialogue, 10)
    assert [(i, turn.reply) for i, turn in enumerate(turns) if turn.reply] == [(4, "C picks a bag"), (7, "C sits")]
    assert not dialogues_of(clips[0], "event_caption")  # moments have no span


def test_redacted_ego4d_narrations_are_put_together_by_annotator(tmp_path):
    said = lambda time, text, uid: {"time": time, "text": text, "_annotation_uid": uid}
    narrations = [said(1, "#C C a", "p"), said(2, "#C C b", "q"), said(9, "#C C c", "p"), said(20, "#C C d", "r")]
    path = write(tmp_path / "a.json", {"videos": {"uid": {"narrations": narrations}}})
    assert [[e.text for e in one.records] for one in repaired("ego4d_narration", path)[0]] == [
        ["C a", "C c", "C d"],
        ["C b"],
    ]


def test_goalstep_has_steps_in_steps(tmp_path):
    inner = {"start_time": 81.0, "end_time": 97.4, "step_description": "weigh the dough"}
    outer = {"start_time": 81.1, "end_time": 269, "step_description": "Prepares the bread", "segments": [inner]}
    path = write(
        tmp_path / "g.json", {"videos": [{"video_uid": "u", "segments": [outer]}, {"video_uid": "w", "segments": []}]}
    )
    [first, second], counts = repaired("ego4d_goalstep", path)
    assert first.records == (Event("weigh the dough", 81.0, 97.4), Event("Prepares the bread", 81.1, 269))
    assert second.records == () and counts.videos["with events that overlap, which is left so"] == 1


SRT = """\ufeff1
00:00:01,500 --> 00:00:03,000
<i>The kettle</i>
boils.

2
00:00:05,000 --> 00:00:04,000
No.
"""
VTT = """WEBVTT - title

STYLE
::cue { color: red }

NOTE 00:00 --> 00:01 is no cue

first
01.500 --> 00:02.0

a1
00:01.500 --> 01:00:03.000 align:start position:0%
<v Ann>The <c.red>kettle</c> &amp; &lt;pot&gt;
boil.
"""


def test_subtitles_are_events(tmp_path):
    [one], counts = repaired("subtitles", write(tmp_path / "kitchen.en.srt", SRT.replace("\n", "\r\n")))
    assert one == Clip("kitchen.en", None, (Event("The kettle boils.", 1.5, 3),)) and counts.dropped == {clip.EMPTY: 1}
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub/a.vtt", VTT)
    clips, counts = repaired("subtitles", tmp_path)
    assert [one.video for one in clips] == ["kitchen.en", "sub/a"] and counts.dropped == {
        clip.EMPTY: 1,
        clip.NO_TEXT: 1,
    }
    assert clips[1].records == (Event("The kettle & <pot> boil.", 1.5, 3603),)
    assert records_of("subtitles", write(tmp_path / "none.vtt", "WEBVTT\n")) == []
    for text in ("", "hello", "{}"):
        with pytest.raises(DialogueError, match="expected cues such as"):
            records_of("subtitles", write(tmp_path / "b.srt", text))


def test_streamo_records_that_do_not_fit_are_dropped(tmp_path):
    good = {"video_path": "a.mp4", "question": [], "response": [{"content": "x", "st_time": 3, "end_time": 3}]}
    backwards = good | {"response": [{"content": "x", "st_time": 3, "end_time": 2}]}
    text = "\n".join(json.dumps(record) for record in [good, {}, backwards, {"messages": []}, good | {"question": 3}])
    clips, counts = repaired("streamo", write(tmp_path / "s.jsonl", text))
    assert counts.kept == 1 and counts.dropped == {streamo.UNREADABLE: 3, clip.EMPTY: 1}


# ------------------------------------------------------------------------------------------------------- the repairs


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (Event(" a  b\n", 1, 2), Event("a b", 1, 2)),
        (Event("a", -1, 2), Event("a", 0, 2)),
        (Event("a", 8, 12), Event("a", 8, 10)),
        (Event("a", 8, 10 + 1e-12), Event("a", 8, 10)),
        (Event("a", None, 4), Event("a", None, 4)),
        (Event("a", None, 10.5), Event("a", None, 10)),
        (Event("a", None, -0.5), Event("a", None, 0)),
        (Event(" \n", 1, 2), clip.NO_TEXT),
        (Event("a", 2, 2), clip.EMPTY),
        (Event("a", 3, 2), clip.EMPTY),
        (Event("a", -3, 0), clip.EMPTY),
        (Event("a", 10, 12), clip.OUTSIDE),
        (Event("a", None, 11.5), clip.OUTSIDE),
        (Event("a", NAN, 2), clip.NO_TIME),
        (Event("a", 1, math.inf), clip.NO_TIME),
        (Event("a", 1, 2, fault="torn"), "torn"),
    ],
)
def test_an_event_is_mended_or_dropped_with_its_reason(event, outcome):
    counts = Counts()
    left = repair(Clip("v", 10, (event,)), counts).records
    if isinstance(outcome, str):
        assert left == () and counts.dropped == {outcome: 1} and not counts.kept and not counts.repaired
    else:
        mended = abs(event.end - outcome.end) > 1e-9 or (event.text, event.start) != (outcome.text, outcome.start)
        assert left == (outcome,) and (counts.kept, counts.repaired) == (not mended, mended)
        assert sum(counts.repairs.values()) == (2 if "  " in event.text else mended)


YES = Event("Yes.", None, 4)


@pytest.mark.parametrize(
    ("question", "outcome"),
    [
        (Question("Q?", 4, (YES,)), Question("Q?", 4, (YES,))),
        (Question("Q? \nA.  x", -1, (YES,)), Question("Q?\nA. x", 0, (YES,))),
        (Question("Q?", 10.4, (Event("a", None, 10.4),)), Question("Q?", 10, (Event("a", None, 10),))),
        (Question("Q?", 1, (YES, Event("a", None, 2))), Question("Q?", 1, (Event("a", None, 2), YES))),
        (Question("", 4, (YES,)), clip.NO_TEXT),
        (Question("Q?", NAN, (YES,)), clip.NO_TIME),
        (Question("Q?", 12, (Event("a", None, 12),)), clip.OUTSIDE),
        (Question("Q?", 4, ()), clip.NO_ANSWER),
        (Question("Q?", 4, (YES, Event("", None, 5))), f"an answer: {clip.NO_TEXT}"),
        (Question("Q?", 4, (Event("a", None, 99),)), f"an answer: {clip.OUTSIDE}"),
    ],
)  # fmt: skip
def test_a_question_is_mended_or_dropped_with_its_reason(question, outcome):
    counts = Counts()
    left = repair(Clip("v", 10, (question,)), counts).records
    assert left == (() if isinstance(outcome, str) else (outcome,))
    assert counts.dropped == ({outcome: 1} if isinstance(outcome, str) else {})
    assert counts.total == counts.kept + counts.repaired + sum(counts.dropped.values()) == 1


def test_the_same_record_again_and_what_no_task_takes_is_dropped():
    counts = Counts()
    records = (Event("a", 1, 2), Event("a ", 1, 2), Event("b", None, 3), Question("Q?", 1, (Event("a", None, 1),)))
    left = repair(Clip("v", NAN, records), counts, TASKS["grounding"].takes)
    assert left == Clip("v", None, (Event("a", 1, 2),)) and counts.dropped == {clip.AGAIN: 1, clip.UNWANTED: 2}


def random_clip(rng):
    """An untidy clip: lengths of either sign, overlaps, times outside the video and no numbers."""
    duration = float(rng.choice([0.4, 1, 1.0005, 2, 30, 47.31, 61.009]))
    times = lambda: float(
        rng.choice(
            [NAN, 0, duration, rng.uniform(-2, duration + 3), rng.integers(0, 62)], p=[0.04, 0.1, 0.16, 0.4, 0.3]
        )
    )
    text = lambda i: "" if rng.random() < 0.05 else f"<{i}>"
    records = []
    for i in range(rng.integers(1, 12)):
        start = None if rng.random() < 0.2 else times()
        records.append(Event(text(i), start, times()))
        if rng.random() < 0.4:
            answers = tuple(Event(f"<{i}.{j}>", None, times()) for j in range(rng.integers(0, 4)))
            records.append(Question(f"Q{i}?", times(), answers))
    return Clip("v.mp4", duration, tuple(records))


def test_whatever_is_left_of_an_untidy_clip_is_said_once_and_inside_the_video():
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(400):
        untidy, counts = random_clip(rng), Counts()
        tidy = repair(untidy, counts)
        assert counts.kept + counts.repaired + sum(counts.dropped.values()) == counts.total == len(untidy.records)
        assert len(tidy.records) == counts.kept + counts.repaired
        for task, fps in ((task, fps) for task in TASKS for fps in (1.0, 1.5, 2.0)):
            taken = [record for record in tidy.records if TASKS[task].takes(record)]
            dialogues = dialogues_of(tidy, task)
            assert bool(taken) == bool(dialogues)
            said = "\n".join(reply for d in dialogues for _, reply in replies_of(d, fps))
            turns = [turn for d in dialogues for turn in turns_of(d, math.ceil((d.duration - 0.001) * fps), fps)]
            asked = [line for turn in turns if turn.query for line in turn.query.split("\n")]
            if task == "grounding":
                assert said.count("From") == len(taken) and len(asked) == len({event.text for event in taken})
            elif "qa" in task:
                assert sorted(asked) == sorted(question.text for question in taken)
                assert all(said.count(answer.text) == 1 for question in taken for answer in question.answers)
            else:
                assert len(asked) == len(dialogues) and all(said.count(event.text) == 1 for event in taken)


# --------------------------------------------------------------------------------------------------------- the tasks

SANDWICH = Clip("v.mp4", 20.0, (Event("Spread it.", 3.0, 7.0), Event("Cut it.", 5.5, 9.2), Event("Eat it.", 12, 20)))


def test_narration_speaks_when_an_event_is_over():
    [dialogue] = dialogues_of(SANDWICH, "narration", "made up")
    assert (dialogue.task, dialogue.source, dialogue.duration, dialogue.video) == ("narration", "made up", 20, "v.mp4")
    assert replies_of(dialogue) == [(7, "Spread it."), (10, "Cut it."), (19, "Eat it.")]
    assert [turn.state for turn in turns_of(dialogue, 20)].count(STANDBY) == 0
    assert turns_of(dialogue, 40, fps=2)[0].query == dialogue.queries[0].text  # in the first frame, at any rate


@pytest.mark.parametrize("task", ["event_caption", "action_caption"])
def test_captions_stand_by_while_something_happens(task):
    [dialogue] = dialogues_of(SANDWICH, task)
    states = [turn.state for turn in turns_of(dialogue, 20)]
    expected = [SILENCE] * 2 + [STANDBY] * 5 + [RESPONSE] + [STANDBY] * 2 + [RESPONSE] + [STANDBY] * 8 + [RESPONSE]
    assert states == expected
    assert replies_of(dialogue) == [(7, "Spread it."), (10, "Cut it."), (19, "Eat it.")]


def test_grounding_asks_one_thing_after_another():
    first, second = dialogues_of(SANDWICH, "grounding")
    assert [query.time for query in first.queries] == [0, 9] and [query.time for query in second.queries] == [0]
    assert "Spread it" in first.queries[0].text and "Eat it" in first.queries[1].text
    assert "Cut it" in second.queries[0].text
    assert replies_of(first) == [(7, "From 3s to 7s."), (19, "From 12s to 20s.")]
    assert replies_of(second) == [(10, "From 6s to 9s.")]
    assert span_in("From 6s to 9s.") == (6, 9)


def test_what_happens_twice_is_told_twice():
    [dialogue] = dialogues_of(Clip("v", 30, (Event("Stir.", 2, 4), Event("Stir.", 9, 9.2))), "grounding")
    assert len(dialogue.queries) == 1
    assert dialogue.responses == (
        Response("From 2s to 4s.", start=2, end=4),
        Response("From 9s to 10s.", start=9, end=9.2),
    )


def test_questions_are_answered_at_once_or_when_the_clue_appears():
    now = Question("Now?", 5, (Event("Yes.", None, 5),))
    later = Question("Later?", 4, (Event("One.", None, 6.5), Event("Two.", None, 11)))
    one = Clip("v", 30, (later, now))
    assert [replies_of(d) for d in dialogues_of(one, "qa")] == [[(4, "Yes.")]]
    assert [replies_of(d) for d in dialogues_of(one, "time_sensitive_qa")] == [[(7, "One."), (11, "Two.")]]


def test_questions_that_would_disturb_each_other_are_in_different_dialogues():
    ask = lambda name, time, until: Question(name, time, (Event("x", None, until),))
    one = Clip("v", 60, (ask("a", 5, 20), ask("b", 8, 9), ask("c", 11, 12), ask("d", 40, 41)))
    asked = [[query.text for query in d.queries] for d in dialogues_of(one, "time_sensitive_qa")]
    assert asked == [["a", "d"], ["b", "c"]]
    together = Clip("v", 60, (ask("a", 5.2, 5.2), ask("b", 5.9, 5.9), ask("c", 6.2, 6.2)))  # a and b share a turn
    assert [[query.text for query in d.queries] for d in dialogues_of(together, "qa")] == [["a", "c"], ["b"]]


def test_lanes_are_as_few_as_there_are_items_at_a_time():
    rng = np.random.Generator(np.random.PCG64(1))
    for _ in range(100):
        spans = [(float(a), float(a + b)) for a, b in rng.integers(0, 30, (rng.integers(1, 20), 2))]
        found = lanes(spans, lambda span: span)
        assert sorted(sum(found, [])) == sorted(spans)
        assert all(b[0] >= a[1] + 1 for lane in found for a, b in zip(lane, lane[1:]))
        assert len(found) == max(sum(a <= t < b + 1 for a, b in spans) for t in range(62))


def test_the_same_annotations_give_the_same_dialogues_in_several_wordings():
    made = [dialogues_of(Clip("v", 50, (Event(f"{i}", 1, 2 + i),)), "grounding") for i in range(30)]
    assert made == [dialogues_of(Clip("v", 50, (Event(f"{i}", 1, 2 + i),)), "grounding") for i in range(30)]
    assert len({d.queries[0].text.replace(f"{i}", "", 1) for i, [d] in enumerate(made)}) == 4
    assert dialogues_of(Clip("v", None, (Event("{0} 100%", 1, 2),)), "grounding")[0].queries[0].text.count("{0} 100%")


# ------------------------------------------------------------------------------------------------------- wrong files


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("activitynet_captions", '{"a": [1,\n 2', "Expecting ',' delimiter: line 2 column 3"),
        ("activitynet_captions", "[]", "expected an object, found a list"),
        ("activitynet_captions", {"v": {"timestamps": 3}}, "v, 'timestamps': expected a list, found 3"),
        ("activitynet_captions", {"v": {"timestamps": []}}, "v, 'sentences': expected a list, found None"),
        ("activitynet_captions", "[" * 100_000, "expected JSON"),
        ("youcook2", {"database": []}, "'database': expected an object, found a list"),
        ("youcook2", {"database": {"v": {"annotations": [3]}}}, "v: expected an object, found 3"),
        ("qvhighlights", '{"vid": "a", "relevant_windows": []}\n\n{"vid"', "line 3: expected JSON"),
        ("qvhighlights", '{"vid": "a", "query": "b"}', "line 1, 'relevant_windows': expected a list, found None"),
        ("didemo", [{"video": 3}], "record 0, 'video': expected text, found 3"),
        ("hirest", {"p": {"v.mp4": {}}}, "v.mp4, 'steps': expected a list"),
        ("epic_kitchens", "video_id,narration\n", "expected a column 'start_timestamp', found video_id, narration"),
        ("epic_kitchens", "", "expected a column 'video_id', found nothing"),
        ("ego4d_narration", {"u": {"narration_pass_1": {}}}, "u, 'narrations': expected a list"),
        ("ego4d_goalstep", {"videos": [{}]}, "video 0, 'video_uid': expected text"),
        ("ego4d_goalstep", {"videos": [{"video_uid": "u", "segments": {}}]}, "expected a list, found an object"),
        ("streamingbench", [[{"video_path": "a"}]], "record 0, record 0, 'questions': expected a list"),
        ("ovo_bench", [{"video": "a", "task": "EPM", "options": [], "gt": "B"}], "'gt': expected a whole number"),
        ("streamo", "{}", "expected a list, found an object"),
    ],
)
def test_a_file_of_another_format_is_a_one_line_error(tmp_path, source, content, expected):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DialogueError) as caught:
        records_of(source, path)
    assert str(caught.value).startswith(str(path)) and expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("source", sorted(SOURCES))
def test_files_that_are_missing_or_no_text_are_one_line_errors(tmp_path, source):
    with pytest.raises(DialogueError, match="No such file"):
        records_of(source, tmp_path / "none.json")
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DialogueError, match="expected text in UTF-8"):
        records_of(source, tmp_path / "a.json")


def test_rows_that_do_not_fit_are_dropped(tmp_path):
    rows = "V1 1.0 2.0##good\nV1 1.0##short\nno marks\n##\nV1 x 2.0##what\n\nV1 1.0 2.0 3.0##more\n"
    [first, *_], counts = repaired("charades_sta", write(tmp_path / "a.txt", rows))
    assert first.records == (Event("good", 1, 2),)
    assert counts.dropped == {"expected video, start, end, ## and a sentence": 4, clip.NO_TIME: 1}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(3, 3), ("4.5", 4.5), ("1:02", 62), ("01:02:03.5", 3723.5), ("00:00:01,25", 1.25), (None, NAN), (True, NAN),
     ("", NAN), ("1:2:3:4", NAN), ([1], NAN), (10**400, NAN), ("9" * 9999 + ":00", NAN)],
)  # fmt: skip
def test_times_are_numbers_or_clocks(value, expected):
    assert seconds(value) == pytest.approx(expected, nan_ok=True)


def test_options_are_put_in_order():
    ask = lambda options, answer: choices.choice("Q?", options, answer, 3.0)
    text = lambda *lines: "\n".join(["Q?", *lines, choices.INSTRUCTION])
    assert ask(["A. x", "B. y"], "B") == Question(text("A. x", "B. y"), 3, (Event("B", None, 3.0),))
    assert ask(["x", "y"], "A") == Question(text("A. x", "B. y"), 3, (Event("A", None, 3.0),), (choices.LETTERED,))
    assert ask(["A.Lebrun.", "Fan"], "B").text == text("A. Lebrun.", "B. Fan")
    assert ask(["A. x", "", "C. z", "B. y", "and y"], "C").text == text("A. x", "B. y and y", "C. z")
    assert ask(["A. x", "B. y", "B. z"], "A").fault == choices.TWICE
    assert ask(["A. x", "B. y"], "C").fault == ask(["x"], "").fault == ask([], "A").fault == choices.NO_OPTION


def test_every_source_offers_tasks_that_there_are():
    assert all(set(source.tasks) <= set(TASKS) and source.tasks for source in SOURCES.values())
