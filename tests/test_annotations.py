"""Annotation files of every kind give their records in any order, in any process, and rows are made of them."""

import collections
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import time

import grain
import numpy as np
import pytest
from PIL import Image

from jstream.config import SiglipConfig, StageConfig
from jstream.data import annotations as reading
from jstream.data import streamo_instruct, video_rows, world
from jstream.data.annotations import Annotations, turns_of_annotation
from jstream.data.batches import batches
from jstream.data.dialogue import DialogueError, dialogue_from_raw, dialogue_to_raw, read_raw
from jstream.data.frames import MAX_JPEG_PIXELS, fit, from_jpeg, to_jpeg
from jstream.data.rows import pack
from jstream.data.video import open_video
from jstream.data.video_rows import VideoRows
from jstream.data.world.write import write_video
from jstream.data.world_rows import WorldRows
from jstream.protocols import live, make_protocol, make_tokenizer, streamo
from jstream.protocols.protocol import RESPONSE, STANDBY, STATE, TEXT

VISION = SiglipConfig(image_size=24, patch_size=12, width=16, num_layers=1, num_heads=2, mlp_dim=16, grid=1)
STAGE = StageConfig(steps=1, rows=1, frames=32, tokens=1200, min_seconds=10, max_seconds=20)
WORLDS = [world.make_world(9, i, world.WorldConfig(12, 14)) for i in range(2)]

RAW = {
    "video_path": "a.mp4",
    "question": [{"content": "What?", "time": "2"}],
    "response": [{"content": "This.", "st_time": 3.0, "end_time": 4.0, "time": ""}],
}
STREAM = streamo.to_stream_format(dialogue_from_raw(RAW), 6)
CHAT = {
    "video": "a.mp4",
    "start": 1.0,
    "conversation": [
        {"role": "stream", "num_frames": 3, "learn": 2},
        {"role": "user", "content": "What is that?"},
        {"role": "assistant", "content": "A star.", "learn": True},
        {"role": "stream", "num_frames": 4, "learn": True},
        {"role": "assistant", "content": "It leaves.", "learn": True},
        {"role": "stream", "num_frames": 2, "learn": False},
        {"role": "assistant", "content": "A ring.", "learn": False},
    ],
}
RECORDS = [RAW, STREAM, CHAT]


def write(path: pathlib.Path, records) -> pathlib.Path:
    """A file of records, of the kind that its name says."""
    texts = [json.dumps(record) for record in records]
    if path.suffix == ".jsonl":
        path.write_text("\n\n" + "\n".join(texts) + "\n", encoding="utf-8")  # blank lines do not matter
    elif path.suffix == ".json":
        path.write_text(" [ " + " ,\n".join(texts) + " ]\n", encoding="utf-8")
    else:
        from array_record.python import array_record_module

        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for text in texts:
            writer.write(text.encode())
        writer.close()
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> pathlib.Path:
    """Two videos of the world with two dialogues each, and two that cannot be read."""
    folder = tmp_path_factory.mktemp("videos")
    dialogues = []
    for index, made in enumerate(WORLDS):
        write_video(made, folder / f"{index}.mp4", 48)
        for task in ("narration", "event_caption"):
            dialogues.append(world.make_dialogue(made, task, world.generator(index), f"{index}.mp4"))
    (folder / "corrupt.mp4").write_bytes((folder / "0.mp4").read_bytes()[:2000])
    bad = [dataclasses.replace(dialogues[0], video=name) for name in ("missing.mp4", "corrupt.mp4")]
    records = [dialogue_to_raw(dialogue) for dialogue in [*dialogues[:1], *bad, *dialogues[1:]]]
    write(folder / "d.jsonl", records)
    return folder


@pytest.fixture(scope="module")
def protocol():
    texts = [
        response.text
        for made in WORLDS
        for response in world.make_dialogue(made, "narration", world.generator(0)).responses
    ]
    config = dataclasses.replace(streamo.PUBLISHED, system="Watch.")
    return make_protocol(config, make_tokenizer(config, texts, 500), VISION.tokens_per_frame)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.array_record"])
def test_every_kind_of_record_reads_from_every_kind_of_file(tmp_path, name):
    annotations = Annotations(write(tmp_path / name, RECORDS))
    raw, stream, chat = annotations
    assert {a.video for a in annotations} == {str(tmp_path / "a.mp4")}
    assert [(a.fps, a.start, a.num_frames) for a in annotations] == [(None, 0, None), (None, 0, 6), (2.0, 1.0, 9)]
    assert turns_of_annotation(raw, 6, 1.0) == streamo.turns_of(dialogue_from_raw(RAW), 6)
    assert turns_of_annotation(stream, 6, 1.0) == turns_of_annotation(raw, 6, 1.0)
    assert turns_of_annotation(chat, 100, 1.0) == live.turns_of_chat(CHAT["conversation"])
    assert len(turns_of_annotation(chat, 4, 1.0)) == 4
    assert [annotations.record(i) for i in range(3)] == RECORDS and annotations.frames(0) is None


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.array_record"])
def test_any_order_gives_what_reading_in_order_gives(tmp_path, name):
    records = [RAW | {"video_path": f"{i}-ü.mp4", "duration": i + 1.5} for i in range(50)]
    annotations = Annotations(write(tmp_path / name, records))
    in_order = list(annotations)
    assert [a.duration for a in in_order] == [record["duration"] for record in records]
    assert [annotations[i] for i in reversed(range(50))] == in_order[::-1]
    assert annotations[-1] == in_order[-1] and annotations[np.int64(7)] == in_order[7]
    with pytest.raises(IndexError):
        annotations[50]


def test_the_published_files_read(shared_data):
    folder = shared_data / "annotations/streamo"
    raw, stream = Annotations(folder / "raw_data.json"), Annotations(folder / "stream_format.json")
    assert len(raw) == len(stream) == 2
    assert [a.said for a in raw] == list(read_raw(folder / "raw_data.json"))
    for i in range(2):
        official = streamo.turns_of(raw[i].said, 76, official=True)  # with the question that leaks, as the file has it
        assert turns_of_annotation(stream[i], 76, 1.0) == official
    [alone] = Annotations(folder / "streaming_video_example.json")
    turns = turns_of_annotation(alone, 99, 1.0)
    assert len(turns) == 10 and [t.state for t in turns].count(STANDBY) == 8 and turns[9].state == RESPONSE


def test_a_shared_copy_of_a_large_file_is_small_and_reads_elsewhere(tmp_path):
    records = [RAW | {"video_path": f"{i}.mp4", "note": "x" * 500} for i in range(10_000)]
    annotations = Annotations(write(tmp_path / "d.jsonl", records))
    annotations[3]  # the file is open
    copy = pickle.dumps(annotations)
    assert len(copy) < 200_000
    assert pickle.loads(copy)[9_999] == annotations[9_999]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(annotations.__getitem__, [9_999, 0]) == [annotations[9_999], annotations[0]]
    child = os.fork()
    if not child:  # a forked process opens the file again
        os._exit(annotations[5].video != str(tmp_path / "5.mp4"))
    assert os.waitpid(child, 0)[1] == 0


# --------------------------------------------------------------------------------------------------- malformed records


def error_of(read) -> str:
    with pytest.raises(DialogueError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


MALFORMED = [
    ([], "expected an object, found list"),
    ({}, "(raw schema)"),
    ({"a": "b" * 1000}, "found 'a'"),
    (RAW | {"question": 3}, "under 'question'"),
    (RAW | {"fps": 0}, "'fps'"),
    (RAW | {"fps": float("nan")}, "'fps'"),
    (RAW | {"fps": "2"}, "'fps'"),
    (STREAM | {"videos": [{}]}, "path of a video"),
    (STREAM | {"messages": STREAM["messages"][1:2] * 2}, "message 1: expected user and assistant by turns"),
    (CHAT | {"video": None}, "path of a video"),
    (CHAT | {"start": -1}, "'start'"),
    (CHAT | {"conversation": "hi"}, "'conversation': expected a list"),
    (CHAT | {"conversation": ["hi"]}, "message 0"),
    (CHAT | {"conversation": [{"role": "stream", "num_frames": 10**12}]}, "message 0"),
    (CHAT | {"conversation": [{"role": "stream", "num_frames": 1, "learn": "all"}]}, "message 0"),
]


def test_a_malformed_record_is_one_line_with_file_and_record(tmp_path):
    for suffix, where in ((".json", "record {}"), (".jsonl", "line {}"), (".array_record", "record {}")):
        records = [RAW, *(record for record, _ in MALFORMED)]
        path = write(
            tmp_path / f"d{suffix}", [r if isinstance(r, dict) or suffix != ".array_record" else {} for r in records]
        )
        annotations = Annotations(path)
        assert annotations[0].video.endswith("a.mp4")
        for index, (record, found) in enumerate(MALFORMED, start=1):
            message = error_of(functools.partial(annotations.__getitem__, index))
            number = index + 3 if suffix == ".jsonl" else index  # lines count from 1, and two are blank
            assert message.startswith(f"{path}, {where.format(number)}: ")
            assert len(message) < 500 and (found in message or not isinstance(record, dict))


def test_a_broken_file_is_one_line(tmp_path, monkeypatch):
    for text in ("", "3", "[", '[{"a": 1}', '[{"a": 1},]', '[{"a": 1}] x', '{"a": 1} {}', "[" * 100_000):
        (tmp_path / "d.json").write_text(text)
        assert "expected a JSON list of annotations" in error_of(lambda: Annotations(tmp_path / "d.json"))
    for name in ("none.json", "none.jsonl", "none.array_record", "none.csv", "."):
        assert str(tmp_path / name) in error_of(lambda name=name: Annotations(tmp_path / name))
    for garbage in (b"x", b"x" * 200_000):
        (tmp_path / "d.array_record").write_bytes(garbage)
        assert "ArrayRecord" in error_of(lambda: len(Annotations(tmp_path / "d.array_record")))
    path = write(tmp_path / "d.jsonl", [RAW, RAW])
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n" + b"[" * 100_000 + b"\n{broken\n")
    annotations = Annotations(path)
    for index, line in ((2, 5), (3, 6), (4, 7)):
        assert f"line {line}: " in error_of(lambda index=index: annotations[index])
    monkeypatch.setattr(reading, "MAX_RECORD", 100)
    assert f"{path}, line 3: expected at most 100 bytes" in error_of(lambda: Annotations(path))
    write(tmp_path / "d.json", [RAW])
    assert "more than 100 bytes" in error_of(lambda: Annotations(tmp_path / "d.json"))


def test_a_jpeg_of_unknown_origin_is_bounded():
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    jpeg = to_jpeg(image, 150, 95)
    assert from_jpeg(jpeg).shape == (10, 15, 3)
    out = io.BytesIO()
    Image.new("L", (2**13, 2**12)).save(out, "JPEG")
    png = io.BytesIO()
    Image.fromarray(image).save(png, "PNG")
    for data in (b"", b"x", jpeg[:200], out.getvalue(), png.getvalue()):
        with pytest.raises(ValueError, match=f"expected a JPEG of at most {MAX_JPEG_PIXELS} pixels"):
            from_jpeg(data)


# --------------------------------------------------------------------------------------------------------------- rows


def test_a_chat_becomes_a_row_that_learns_what_is_published(videos, tmp_path):
    path = write(tmp_path / "chats.json", [CHAT | {"video": str(videos / "0.mp4")}])
    config = dataclasses.replace(live.PUBLISHED, system="Watch.")
    protocol = make_protocol(config, make_tokenizer(config, ["A star. It leaves. A ring. What is that?"] * 9, 400), 2)
    rows = VideoRows(path, STAGE, protocol, VISION)
    row = rows[0]
    frames, turns = 9, row["decisions"][row["decisions"] >= 0]
    assert len(turns) == frames and row["row"] == 0
    learned = [row["kinds"][t] == STATE for t in turns]
    assert learned == [True, True, False, True, True, True, True, False, False]  # 2 of 3, all of 4, none of 2
    comma, bracket = protocol.decision_ids
    assert [row["labels"][t] for t in turns[learned]] == [comma] * 5 + [bracket]
    words = protocol.tokenizer.decode([t for t in row["labels"][row["kinds"] == TEXT] if t != protocol.end_id])
    assert words.replace("\n", "") == "Assistant: A star.Assistant: It leaves."
    with open_video(videos / "0.mp4", 2.0) as video:
        shown = [fit(frame.image, VISION) for frame in video][2 : 2 + frames]  # from second 1 on
    np.testing.assert_array_equal(row["frames"][:frames], shown)


def test_standby_that_ends_in_no_reply_is_learned_as_the_file_says(protocol):
    record = {"videos": ["a.mp4"], "messages": []}
    for state in ("</Silence>", "</Standby>", "</Response> Now.", "</Response>", "</Standby>"):
        record["messages"] += [{"role": "user", "content": "<stream>"}, {"role": "assistant", "content": state}]
    turns = turns_of_annotation(reading.read_annotation(record), 9, 1.0)
    assert [(t.state, t.reply) for t in turns] == [(0, None), (1, None), (2, "Now."), (0, None), (1, None)]


def used(row) -> tuple[int, int]:
    return int((row["decisions"] >= 0).sum()), int((row["positions"] >= 0).sum())


def test_no_dialogue_that_fits_a_row_is_cut(videos, protocol, tmp_path):
    dialogues = [d for d in read_raw(videos / "d.jsonl") if d.video[0] in "01"]
    records = [
        dialogue_to_raw(dataclasses.replace(d, duration=float(4 + 3 * i % 9))) for i, d in enumerate(dialogues * 3)
    ]
    path = write(
        tmp_path / "d.jsonl", [record | {"video_path": str(videos / record["video_path"])} for record in records]
    )
    lengths = [protocol.render(turns_of_annotation(a, int(a.duration), 1.0)) for a in Annotations(path)]
    whole = sorted(len(rendering.tokens) for rendering in lengths)
    stage = dataclasses.replace(STAGE, frames=20, tokens=whole[-2] + 3)  # the longest alone is cut
    rows = VideoRows(path, stage, protocol, VISION)
    laid = []
    for index in range(len(rows)):
        row = rows[index]
        frames, tokens = used(row)
        assert frames <= stage.frames and tokens <= stage.tokens and row["row"] == index
        laid += [int((row["segments"] == s).sum()) for s in np.unique(row["segments"]) if s >= 0]
    [cut] = (collections.Counter(laid) - collections.Counter(whole)).elements()
    assert len(laid) == len(whole) and stage.tokens - 60 < cut <= stage.tokens
    named = ", ".join(rows.describe(index) for index in range(len(rows)))
    assert named.count(".mp4") == len(records) and str(videos / "1.mp4") in named


def test_many_dialogues_are_planned_in_several_processes(videos, protocol, monkeypatch):
    rows = [VideoRows(videos / "d.jsonl", STAGE, protocol, VISION)]
    monkeypatch.setattr(video_rows, "_MANY", 2)
    monkeypatch.setattr(video_rows.os, "cpu_count", lambda: 2)
    rows.append(VideoRows(videos / "d.jsonl", STAGE, protocol, VISION))
    assert len({tuple(map(made.describe, range(len(made)))) for made in rows}) == 1


def first_fit(needs, frames):
    """Rows by frames alone, the longest first; what is too much is lost: packing as it used to be."""
    room, rows = [], []
    for i in sorted(range(len(needs)), key=lambda i: -needs[i][0]):
        row = next((r for r in range(max(0, len(room) - 64), len(room)) if room[r] >= needs[i][0]), None)
        if row is None:
            row = len(room)
            room.append(frames)
            rows.append([])
        room[row] -= needs[i][0]
        rows[row].append(i)
    return rows


@pytest.mark.parametrize("tokens_a_frame", [8, 12, 20])
def test_packing_cuts_nothing_and_fills_rows_as_well_as_one_that_cuts(tokens_a_frame):
    rng = np.random.default_rng(0)
    frames = rng.integers(5, 100, 2000)
    needs = np.stack([frames, frames * 10 + rng.integers(20, 200, 2000)], axis=1)
    room = np.array([128, 128 * tokens_a_frame + 256])
    needs = needs[(needs <= room).all(axis=1)]
    rows = pack(needs, tuple(room), rng.permutation(len(needs)))
    assert sorted(i for row in rows for i in row) == list(range(len(needs)))
    sums = np.array([needs[row].sum(axis=0) for row in rows])
    assert (sums <= room).all()
    fill = (sums / room).mean(axis=0).max()  # of what runs out first
    old = np.array([np.minimum(needs[row].sum(axis=0), room) for row in first_fit(needs, room[0])])
    assert fill > 0.97 and fill >= (old / room).mean(axis=0).max() - 0.01


def test_a_broken_batch_can_be_named(protocol, videos):
    stage = dataclasses.replace(STAGE, rows=2, max_seconds=12, frames=16, tokens=640)
    rows = WorldRows(3, stage, 2, protocol, VISION)
    batch = next(iter(grain.MapDataset.source(rows).batch(2).to_iter_dataset()))
    assert batch["row"].dtype == np.int32 and batch["row"].tolist() == [0, 1]
    assert rows.describe(17) == "world row 17 of stage 2"


# ------------------------------------------------------------------------------------------------------------ prepared


def test_a_prepared_dataset_gives_the_rows_of_its_videos(videos, protocol, tmp_path, caplog):
    made = streamo_instruct.prepare(videos / "d.jsonl", tmp_path)
    assert (made["videos"], made["annotations"], made["skipped"]) == (2, 4, 2)
    skipped = [json.loads(line) for line in (made["folder"] / "skipped.jsonl").read_text().splitlines()]
    assert [pathlib.Path(record["video"]).name for record in skipped] == ["missing.mp4", "corrupt.mp4"]
    assert "found nothing there" in skipped[0]["why"] and [p.name for p in tmp_path.rglob("decoded")] == []

    prepared = Annotations(tmp_path)
    for index, number in enumerate((0, 0, 1, 1)):
        assert prepared[index].video == str(videos / f"{number}.mp4")
        with open_video(videos / f"{number}.mp4") as video:
            shown = np.stack([frame.image for frame in video])
        kept = np.stack([from_jpeg(jpeg) for jpeg in prepared.frames(index)])
        assert kept.shape == shown.shape and np.abs(kept.astype(float) - shown).mean() < 4
    assert len(pickle.dumps(prepared)) < 20_000

    stage = dataclasses.replace(STAGE, frames=96, tokens=4000)
    rows = [VideoRows(path, stage, protocol, VISION) for path in (videos / "d.jsonl", tmp_path)]
    assert [len(made) for made in rows] == [1, 1]
    real, ready = rows[0][0], rows[1][0]
    assert real["left_out"] == 2 and "missing.mp4" in caplog.text and "corrupt.mp4" in caplog.text
    order = lambda row: sorted(
        (row["tokens"][row["segments"] == s].tobytes(), row["labels"][row["segments"] == s].tobytes())
        for s in range(6)
        if (row["segments"] == s).any()
    )
    assert order(real) == order(ready)
    assert used(real) == used(ready)
    with contextlib.closing(batches(rows[1], 2, 0, workers=1)) as in_order:
        batch = next(in_order)
    assert all(np.array_equal(batch[name], [ready[name]] * 2) for name in ready)  # one row, and again

    import tensorflow_datasets as tfds

    assert "tensorflow" not in sys.modules
    source = tfds.builder_from_directory(made["folder"]).as_data_source("train")
    assert len(source) == 2 and source[1]["frames"][0].shape == (48, 48, 3) and source[1]["times"][3] == 3.0


def contents(folder) -> list:
    annotations = Annotations(folder)
    return [(annotations.record(i), annotations.frames(i)) for i in range(len(annotations))]


def test_records_do_not_depend_on_the_number_of_workers(videos, tmp_path):
    for workers in (1, 2):
        streamo_instruct.prepare(videos / "d.jsonl", tmp_path / str(workers), workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_chats_are_prepared_from_their_first_frame_on(videos, tmp_path):
    chats = [CHAT, CHAT | {"start": 0}, CHAT | {"fps": 1.0, "start": 2}]
    path = write(tmp_path / "c.json", [chat | {"video": str(videos / "0.mp4")} for chat in chats])
    sampling = streamo_instruct.Sampling(max_frames=5, max_pixels=500)
    made = streamo_instruct.prepare(path, tmp_path, sampling)
    prepared = Annotations(made["folder"])
    assert [(a.fps, a.num_frames) for a in prepared] == [(2.0, 5), (2.0, 5), (1.0, 5)]
    assert from_jpeg(prepared.frames(0)[0]).shape == (22, 22, 3)
    assert prepared.frames(0)[:3] == prepared.frames(1)[2:]


def test_a_dataset_of_other_settings_is_not_taken_for_this_one(videos, tmp_path):
    streamo_instruct.prepare(videos / "d.jsonl", tmp_path)
    before = sorted(tmp_path.rglob("*"))
    streamo_instruct.prepare(videos / "d.jsonl", tmp_path)
    with pytest.raises(DialogueError, match="quality = 90, not 50"):
        streamo_instruct.prepare(videos / "d.jsonl", tmp_path, streamo_instruct.Sampling(quality=50))
    assert sorted(tmp_path.rglob("*")) == before
    write(tmp_path / "none.jsonl", [RAW])
    with pytest.raises(DialogueError, match="expected a video that can be read, found none: .*a.mp4"):
        streamo_instruct.prepare(tmp_path / "none.jsonl", tmp_path / "none")
    assert not list((tmp_path / "none").rglob("1.0.0"))


def test_a_killed_build_leaves_nothing_under_the_final_name_and_goes_on(videos, tmp_path, monkeypatch):
    records = [dialogue_to_raw(dialogue) for dialogue in read_raw(videos / "d.jsonl")]
    for number in range(80):
        (tmp_path / f"{number}.mp4").symlink_to(videos / "0.mp4")
    write(tmp_path / "d.jsonl", [records[0] | {"video_path": f"{number}.mp4"} for number in range(80)])
    command = [sys.executable, "-m", "jstream.data.streamo_instruct", f"--annotations={tmp_path / 'd.jsonl'}"]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [*command, f"--out={tmp_path}", "--workers=1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    decoded = tmp_path / "streamo_instruct/decoded"
    deadline = time.time() + 60
    while process.poll() is None and len(list(decoded.glob("*.npz"))) < 2 and time.time() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = list(decoded.glob("*.npz"))
    assert kept and not list(tmp_path.rglob("1.0.0")) and list(tmp_path.rglob("incomplete.*"))

    encoded = []
    monkeypatch.setattr(streamo_instruct, "to_jpeg", lambda *args: encoded.append(1) or to_jpeg(*args))
    made = streamo_instruct.prepare(tmp_path / "d.jsonl", tmp_path)
    assert made["videos"] == 80 and len(encoded) == (80 - len(kept)) * WORLDS[0].duration
    assert [path.name for path in (tmp_path / "streamo_instruct").iterdir()] == ["1.0.0"]
