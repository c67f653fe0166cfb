"""The command that prepares annotated videos: what it writes is read back, its counts add up, killed it goes on."""

import collections
import dataclasses
import json
import math
import subprocess
import sys

import pytest

from jstream.config import ConfigError, SiglipConfig, StageConfig
from jstream.data import prepare as preparing
from jstream.data import world
from jstream.data.annotations import Annotations, turns_of_annotation
from jstream.data.dialogue import DialogueError, read_raw
from jstream.data.prepare import prepare, videos
from jstream.data.sources import clip
from jstream.data.video_rows import VideoRows
from jstream.data.world.write import write_video
from jstream.protocols import make_protocol, make_tokenizer, streamo
from jstream.protocols.protocol import TEXT

SECONDS = 12
RECIPE = {  # as YouCook2 names its videos, whose files have no "v_" and come in many containers
    "v_here": {"duration": SECONDS, "timestamps": [[1, 3], [5, 8], [10, 12]], "sentences": ["cut", " stir", "eat"]},
    "v_gone": {"duration": 20, "timestamps": [[0, 4], [6, 6]], "sentences": ["mix", "bake"]},
}
MOMENTS = "here 1.0 3.0##a star jumps\nhere 5.0 99.0##a ring spins\ntwice 0.0 2.0##it leaves\nbroken 0.0 2.0##none\n"


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read_counts(path):
    counts = json.loads(path.read_text(encoding="utf-8"))
    assert counts["kept"] + counts["repaired"] + sum(counts["dropped"].values()) == counts["total"]
    return counts


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos in folders: one that is there, one there twice, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("a/b/here.mp4", "a/twice.mp4"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(world.make_world(9, 0, world.WorldConfig(SECONDS, SECONDS)), folder / name, 32, fps=4)
    (folder / "twice.MKV").write_bytes(b"")
    (folder / "broken.webm").write_bytes((folder / "a/twice.mp4").read_bytes()[:500])
    (folder / "here.txt").write_text("no video")
    return folder


# ---------------------------------------------------------------------------------------------------------- dialogues


def test_what_is_written_is_what_training_reads(tmp_path):
    annotations = write(tmp_path / "yc2.json", RECIPE)
    out = tmp_path / "made/train.jsonl"
    made, counts = prepare("youcook2", annotations, ["narration", "event_caption", "grounding"], out)
    assert made == out and names(out.parent) == ["train.counts.json", "train.jsonl"]
    assert read_counts(out.with_suffix(".counts.json")) == vars(counts)
    assert (counts.kept, counts.repaired, counts.dropped) == (3, 1, {clip.EMPTY: 1})
    assert counts.dialogues == {"narration": 2, "event_caption": 2, "grounding": 2}
    read = Annotations(out)
    assert [a.said.task for a in read] == ["narration", "event_caption", "grounding"] * 2
    assert {(a.video, a.duration) for a in read} == {
        (str(out.parent / "v_here.mp4"), SECONDS),
        (str(out.parent / "v_gone.mp4"), 20),
    }
    replies = [[(turn.start, turn.reply) for turn in turns_of_annotation(a, SECONDS, 1.0) if turn.reply] for a in read]
    assert replies[:3] == [
        [(3, "cut"), (8, "stir"), (11, "eat")],
        [(3, "cut"), (8, "stir"), (11, "eat")],
        [(3, "From 1s to 3s."), (8, "From 5s to 8s."), (11, "From 10s to 12s.")],
    ]
    queries = [turn.query for turn in turns_of_annotation(read[0], SECONDS, 1.0)]
    assert queries[0] and not any(queries[1:])


def test_rows_to_train_on_are_made_of_it(folder, tmp_path):
    prepare("youcook2", write(tmp_path / "yc2.json", RECIPE), ["narration"], tmp_path / "a.jsonl", videos=folder)
    config = dataclasses.replace(streamo.PUBLISHED, system="Watch.")
    protocol = make_protocol(config, make_tokenizer(config, ["cut stir eat"], 400), 1)
    stage = StageConfig(steps=1, rows=1, frames=16, tokens=1000, min_seconds=10, max_seconds=20)
    vision = SiglipConfig(image_size=24, patch_size=12, width=16, num_layers=1, num_heads=2, mlp_dim=16, grid=1)
    [row] = VideoRows(tmp_path / "a.jsonl", stage, protocol, vision)
    learned = protocol.tokenizer.decode(row["labels"][row["kinds"] == TEXT].tolist())
    assert [word for word in ("cut", "stir", "eat", "mix") if word in learned] == ["cut", "stir", "eat"]


def test_a_folder_or_a_list_is_written_where_one_is_asked_for(tmp_path):
    annotations = write(tmp_path / "yc2.json", RECIPE)
    prepare("youcook2", annotations, ["narration"], tmp_path / "folder")
    prepare("youcook2", annotations, ["narration"], tmp_path / "list.json")
    assert names(tmp_path / "folder") == ["counts.json", "dialogues.jsonl"]
    assert list(read_raw(tmp_path / "folder/dialogues.jsonl")) == list(read_raw(tmp_path / "list.json"))
    assert (tmp_path / "list.counts.json").read_text() == (tmp_path / "folder/counts.json").read_text()


def test_real_annotations_of_every_kind_are_read_back(shared_data, tmp_path):
    folder = shared_data / "annotations"
    epic = "epic_kitchens_100/EPIC_100_validation.csv", "epic_kitchens_100/EPIC_100_video_info.csv"
    for source, name, durations, tasks in [
        ("activitynet_captions", "activitynet_captions/train_modified.json", None, ["event_caption"]),
        ("charades_sta", "charades_sta/charades_sta_test.txt", "charades_sta/Charades_v1_test.csv", []),
        ("epic_kitchens", *epic, ["narration"]),
        ("ovo_bench", "ovo_bench/ovo_bench_new.json", None, ["qa", "time_sensitive_qa", "grounding"]),
        ("streamo", "streamo/raw_data.json", None, []),
    ]:
        out = tmp_path / f"{source}.jsonl"
        _, counts = prepare(source, folder / name, tasks, out, durations and folder / durations)
        read_counts(tmp_path / f"{source}.counts.json")
        read = Annotations(out)
        assert len(read) == sum(counts.dialogues.values())
        for index in range(0, len(read), 101):
            annotation = read[index]
            turns = turns_of_annotation(annotation, math.ceil(annotation.duration or 1800), 1.0)
            asked, said = (sum(bool(getattr(turn, what)) for turn in turns) for what in ("query", "reply"))
            assert asked and said, (source, index)
    assert (counts.dialogues, read[0].said.task) == ({"QA": 2}, "QA")


# -------------------------------------------------------------------------------------------------------- the videos


def test_records_without_a_video_are_dropped_and_counted(folder, tmp_path):
    annotations = write(tmp_path / "yc2.json", RECIPE)
    _, counts = prepare("youcook2", annotations, ["narration"], tmp_path / "a.jsonl", videos=folder)
    assert counts.dropped == {videos.MISSING: 2} and counts.left_out == {"v_gone": videos.MISSING}
    [annotation] = Annotations(tmp_path / "a.jsonl")
    assert annotation.video == str(folder / "a/b/here.mp4")


def test_durations_that_nobody_states_are_those_of_the_files(folder, tmp_path):
    annotations = write(tmp_path / "sta.txt", MOMENTS)
    _, counts = prepare("charades_sta", annotations, [], tmp_path / "a.jsonl", videos=folder, workers=2)
    assert counts.repairs == {clip.LATE: 1} and counts.kept == 1
    assert counts.dropped == {videos.AMBIGUOUS: 1, videos.UNREADABLE: 1}
    assert counts.left_out == {"twice": videos.AMBIGUOUS, "broken": videos.UNREADABLE}
    assert {a.duration for a in Annotations(tmp_path / "a.jsonl")} == {SECONDS}
    table = write(tmp_path / "d.json", {"here": 30})  # a table goes before the file
    prepare("charades_sta", annotations, [], tmp_path / "b.jsonl", table, folder)
    assert {a.duration for a in Annotations(tmp_path / "b.jsonl")} == {30}


def test_without_videos_and_durations_ends_stay_as_they_are(tmp_path):
    _, counts = prepare("charades_sta", write(tmp_path / "sta.txt", MOMENTS), [], tmp_path / "a.jsonl")
    assert counts.kept == counts.total == 4
    assert {a.duration for a in Annotations(tmp_path / "a.jsonl")} == {None}


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("here", "a/b/here.mp4"),
        ("v_here", "a/b/here.mp4"),
        ("here.mkv", "a/b/here.mp4"),
        ("./elsewhere/here.webm", "a/b/here.mp4"),
        ("a/twice.mp4", "a/twice.mp4"),
        ("twice.mp4", videos.AMBIGUOUS),
        ("x_210.0_360.0", videos.MISSING),
        ("../here.mp4", "a/b/here.mp4"),
        ("here.txt", videos.MISSING),
        ("", videos.MISSING),
    ],
)
def test_videos_are_found_by_path_or_by_name(folder, video, expected):
    found = videos.Folder(folder).find(video)
    assert found == (folder / expected if expected.endswith("mp4") else expected)


def test_names_keep_dots_that_are_no_extension():
    assert (
        videos.bare("a/NUsG9BgSes0_210.0_360.0.mp4")
        == videos.bare("NUsG9BgSes0_210.0_360.0")
        == "NUsG9BgSes0_210.0_360.0"
    )
    assert videos.bare("./x.y.MKV") == "x.y" and videos.bare(".mp4") == ".mp4"
    assert videos.file_name("v_a") == "v_a.mp4" and videos.file_name("b/a_1.5") == "b/a_1.5.mp4"
    assert videos.file_name("b/a.webm") == "b/a.webm"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "video_id,duration,fps\na.b,12.5,3\n"),
        ("a.csv", "id,subject,length\na.b,X,12.5\n"),
        ("a.json", {"a.b": 12.5}),
        ("a.json", {"x/a.b.mp4": {"duration": 12.5}}),
        ("a.json", {"videos": [{"video_uid": "a.b", "duration_sec": 12.5, "fps": 30}]}),
    ],
)
def test_tables_of_durations(tmp_path, name, content):
    assert videos.read_durations(write(tmp_path / name, content)) == {"a.b": 12.5}


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "name,seconds\na,3\n", "record 0: expected video_id or id or video_uid or video, and duration"),
        ("a.json", {"videos": [3]}, "record 0: expected an object, found 3"),
        ("a.json", "[", "expected JSON, found: Expecting value: line 1 column 2"),
    ],
)
def test_a_table_of_something_else_is_a_one_line_error(tmp_path, name, content, expected):
    with pytest.raises(DialogueError, match=expected):
        videos.read_durations(write(tmp_path / name, content))


# ----------------------------------------------------------------------------------------------------------- resuming


def test_what_was_opened_is_not_opened_again(folder, tmp_path, monkeypatch):
    annotations, out = write(tmp_path / "sta.txt", MOMENTS), tmp_path / "a.jsonl"
    prepare("charades_sta", annotations, [], out, videos=folder)
    expected = out.read_bytes()
    out.unlink()

    opened = collections.Counter()
    length = videos._length

    def killed_at_the_second(file):
        opened[file.name] += 1
        if len(opened) == 2:
            raise KeyboardInterrupt
        return length(file)

    monkeypatch.setattr(videos, "_length", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        prepare("charades_sta", annotations, [], out, videos=folder)
    kept = tmp_path / "a.jsonl.opened"
    assert names(tmp_path) == ["a.counts.json", "a.jsonl.opened", "sta.txt"] and len(opened) == 2
    kept.write_text(kept.read_text() + '{"half a li', encoding="utf-8")

    opened.clear()
    monkeypatch.setattr(videos, "_length", lambda file: opened.update([file.name]) or length(file))
    prepare("charades_sta", annotations, [], out, videos=folder)
    assert len(opened) == 1 and out.read_bytes() == expected and not kept.exists()


def test_a_run_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    annotations, out = write(tmp_path / "yc2.json", RECIPE), tmp_path / "a.jsonl"
    prepare("youcook2", annotations, ["narration"], out)
    before = out.read_bytes()

    def breaks_off(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "dialogues_of", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        prepare("youcook2", annotations, ["grounding"], out)
    assert out.read_bytes() == before and names(tmp_path) == ["a.counts.json", "a.jsonl", "yc2.json"]


def test_with_frames_it_is_a_dataset(folder, tmp_path):
    annotations, out = write(tmp_path / "yc2.json", RECIPE), tmp_path / "out"
    made, counts = prepare("youcook2", annotations, ["narration", "grounding"], out, videos=folder, fps=2.0)
    assert made == out / "streamo_instruct/1.0.0"
    assert read_counts(out / "counts.json") == vars(counts)
    read = Annotations(out)
    assert len(read) == counts.dialogues.total() and read[0].fps == 2 and len(read.frames(0)) == 2 * SECONDS
    turns = turns_of_annotation(read[0], read[0].num_frames, 1.0)
    assert [(turn.start, turn.reply) for turn in turns if turn.reply] == [(3.5, "cut"), (8.5, "stir"), (11.5, "eat")]
    assert prepare("youcook2", annotations, ["narration", "grounding"], out, videos=folder, fps=2.0)[0] == made
    with pytest.raises(DialogueError, match="delete it or use another folder"):
        prepare("youcook2", annotations, ["grounding"], out, videos=folder, fps=2.0)


# -------------------------------------------------------------------------------------------------------- the command


def test_unknown_names_and_missing_files_are_one_line_errors(folder, tmp_path):
    annotations, out = write(tmp_path / "yc2.json", RECIPE), tmp_path / "a.jsonl"
    for source, tasks, kind, expected in [
        ("youcook3", ["narration"], ConfigError, "source: expected one of activitynet_captions, .*, found 'youcook3'"),
        ("youcook2", ["qa"], ConfigError, "task: expected one of narration, .* for youcook2, found 'qa'"),
        ("youcook2", [], ConfigError, "task: expected one of narration, .* found 'none'"),
        ("didemo", [], DialogueError, "yc2.json: expected a list, found an object"),
    ]:
        with pytest.raises(kind, match=expected):
            prepare(source, annotations, tasks, out)
    with pytest.raises(DialogueError, match="none.json: expected annotations, found: No such file"):
        prepare("youcook2", tmp_path / "none.json", ["narration"], out)
    with pytest.raises(DialogueError, match="expected a folder of videos, found none"):
        prepare("youcook2", annotations, ["narration"], out, videos=tmp_path)
    with pytest.raises(ConfigError, match="frames: expected a folder"):
        prepare("youcook2", annotations, ["narration"], out, videos=folder, fps=1.0)
    bad = write(tmp_path / "bad.json", {"v": {"duration": 5, "timestamps": [[2, 1]], "sentences": ["x"]}})
    with pytest.raises(
        DialogueError, match=r"youcook2: expected records for narration, found none of use: ends at .* \(1\)"
    ):
        prepare("youcook2", bad, ["narration"], out)
    assert names(tmp_path) == ["bad.json", "yc2.json"]


def run(*flags):
    command = [sys.executable, "-m", "jstream.data.prepare", *flags]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_its_counts(folder, tmp_path):
    annotations, out = write(tmp_path / "yc2.json", RECIPE), tmp_path / "a.jsonl"
    flags = [f"--annotations={annotations}", f"--out={out}", f"--videos={folder}"]
    done = run("--source=youcook2", "--task=narration", "--task=grounding", *flags)
    assert done.returncode == 0, done.stderr
    assert "5 records: 2 kept, 1 repaired, 2 dropped" in done.stdout and str(out) in done.stdout
    assert f"2  {videos.MISSING}" in done.stdout and len(Annotations(out)) >= 2
    wrong = run("--source=qvhighlights", *flags[:2])
    assert wrong.returncode == 1 and wrong.stderr.startswith(
        f"error: {annotations}, line 1, 'relevant_windows': expected a list"
    )
    assert wrong.stderr.count("\n") == 1
