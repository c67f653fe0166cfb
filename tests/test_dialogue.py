"""Dialogues and the raw schema they are exchanged in."""

import json

import pytest

from jstream.data import world as worlds
from jstream.data.dialogue import (
    Dialogue,
    DialogueError,
    Query,
    Response,
    dialogue_from_raw,
    dialogue_to_raw,
    read_raw,
    write_raw,
)

KITCHEN = Dialogue(
    video="videos/kitchen.mp4",
    queries=(Query("Tell me when the kettle boils.", 1.0), Query("Und jetzt? 🦙", 7.5)),
    responses=(Response("From 3s to 6s.", start=3.0, end=6.0), Response("Es kocht “jetzt”.\nJa.", time=9.0)),
    task="forward_grounding",
    source="hand",
    duration=12.5,
)


def raw(**changes):
    """A good record of the raw schema, with changes; a value of `...` takes the key out."""
    record = {
        "video_path": "a.mp4",
        "question": [{"content": "What?", "time": "5"}],
        "response": [{"content": "This.", "st_time": 5.0, "end_time": 6.0, "time": ""}],
    } | changes
    return {key: value for key, value in record.items() if value is not ...}


def error_of(record):
    with pytest.raises(DialogueError) as caught:
        dialogue_from_raw(record)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["dialogues.json", "dialogues.jsonl"])
def test_what_is_written_is_read_back_the_same(tmp_path, name):
    made = [worlds.make_world(3, index) for index in range(8)]
    random = [worlds.sample_dialogue(w, worlds.generator(3, w.index), worlds.DEFAULT_WEIGHTS) for w in made]
    bare = Dialogue("b.mp4", (), ())
    write_raw(tmp_path / name, [KITCHEN, bare, *random])
    assert list(read_raw(tmp_path / name)) == [KITCHEN, bare, *random]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_one_record_survives_the_raw_schema_and_json():
    record = dialogue_to_raw(KITCHEN)
    assert record["video_name"] == "kitchen.mp4"
    assert record["question"][0] == {"content": "Tell me when the kettle boils.", "time": "1"}
    assert record["response"][0] == {"content": "From 3s to 6s.", "st_time": 3.0, "end_time": 6.0, "time": ""}
    assert dialogue_from_raw(json.loads(json.dumps(record))) == KITCHEN


def test_a_jsonl_file_holds_one_record_a_line_and_blank_lines_do_not_matter(tmp_path):
    path = tmp_path / "d.jsonl"
    write_raw(path, [KITCHEN, KITCHEN])
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [dialogue_to_raw(KITCHEN)] * 2
    assert "🦙" in lines[0]  # readable as it stands
    path.write_text("\n" + "\n\n".join(lines) + "\n\n", encoding="utf-8")
    assert list(read_raw(path)) == [KITCHEN, KITCHEN]


def test_the_published_annotations_read(shared_data):
    first, second = read_raw(shared_data / "annotations/streamo/raw_data.json")
    folder = "LLaVA_Video/1_2_m_youtube_v0_1/liwei_youtube_videos/videos/youtube_video_2024"
    assert first.video == second.video == f"{folder}/ytb_ls8tmkfD7S0.mp4"
    assert first.queries[0].time == 5.0 and first.queries[0].text.endswith("in front of a poster for 'The Beguiled'?")
    assert second.queries == (Query("What is the interviewer holding during the first red carpet event?", 3.0),)
    assert second.responses == (Response("A microphone with the 'ET' logo.", start=5.0, end=6.0),)
    assert (second.task, second.source, second.duration) == ("QA", "LLaVA_Video", None)


# ------------------------------------------------------------------------------------------------------------ reading


def test_times_are_numbers_or_strings_that_hold_one():
    for written, seconds in [("5", 5.0), ("2.5", 2.5), (5, 5.0), (0, 0.0), (" 7 ", 7.0), ("", 0.0), (None, 0.0)]:
        dialogue = dialogue_from_raw(raw(question=[{"content": "What?", "time": written}]))
        assert dialogue.queries == (Query("What?", seconds),)


def test_queries_and_responses_come_in_the_order_of_their_turns():
    record = raw(
        question=[{"content": "b", "time": "9"}, {"content": "a", "time": "10"}, {"content": "c", "time": 2}],
        response=[
            {"content": "late", "st_time": 2, "end_time": 9, "time": ""},
            {"content": "first", "st_time": "", "end_time": "", "time": "4"},
            {"content": "second", "st_time": 3, "end_time": 5, "time": ""},
        ],
    )
    dialogue = dialogue_from_raw(record)
    assert [q.text for q in dialogue.queries] == ["c", "b", "a"]
    assert [r.text for r in dialogue.responses] == ["first", "second", "late"]


def test_a_span_goes_before_a_time():
    item = {"content": "x", "st_time": 1, "end_time": 2, "time": 9}
    assert dialogue_from_raw(raw(response=[item])).responses == (Response("x", None, 1.0, 2.0),)


def test_the_name_stands_in_for_a_missing_path():
    assert dialogue_from_raw(raw(video_path=..., video_name="b.mp4")).video == "b.mp4"


# --------------------------------------------------------------------------------------------------- malformed records


@pytest.mark.parametrize("key", ["question", "response"])
@pytest.mark.parametrize("value", [..., None, {}, "none", 3])
def test_a_missing_list_is_named(key, value):
    assert f"expected a list under '{key}'" in error_of(raw(**{key: value}))


@pytest.mark.parametrize("value", [..., None, "", 5, ["a.mp4"]])
def test_a_missing_video_is_named(value):
    assert "expected a path under 'video_path'" in error_of(raw(video_path=value))


@pytest.mark.parametrize("value", ["soon", "1:30", -1, "-0.5", float("nan"), "nan", float("inf"), "inf", True, [1], {}])
def test_a_time_that_is_no_number_of_seconds_is_an_error(value):
    for record in (
        raw(question=[{"content": "What?", "time": value}]),
        raw(response=[{"content": "This.", "st_time": value, "end_time": 6.0, "time": ""}]),
        raw(response=[{"content": "This.", "st_time": 5.0, "end_time": value, "time": ""}]),
        raw(response=[{"content": "This.", "time": value}]),
        raw(duration=value),
    ):
        message = error_of(record)
        assert "expected seconds (a number ≥ 0)" in message and repr(value) in message


@pytest.mark.parametrize(
    "item", [{}, {"content": ""}, {"content": " \n"}, {"content": None}, {"content": 4}, "What?", 7]
)
def test_an_empty_text_is_an_error(item):
    assert "a question of a.mp4: expected text" in error_of(raw(question=[item]))
    assert "a response of a.mp4: expected text" in error_of(raw(response=[item]))


@pytest.mark.parametrize("times", [{}, {"st_time": 3}, {"end_time": 3}, {"end_time": 3, "time": 3}, {"time": ""}])
def test_a_response_needs_a_time_or_a_whole_span(times):
    assert "expected a time, or a start and an end" in error_of(raw(response=[{"content": "This.\nThat."} | times]))


@pytest.mark.parametrize("record", [None, [], "a.mp4", 3])
def test_a_record_that_is_no_object_is_an_error(record):
    assert "expected an object" in error_of(record)


# ------------------------------------------------------------------------------------------------------ broken files


def file_error(path):
    with pytest.raises(DialogueError) as caught:
        list(read_raw(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def test_a_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "d.jsonl"
    good = json.dumps(raw())
    for broken, found in [("{not json", "Expecting property name"), ("[]", "expected an object"), (good[:-9], "")]:
        path.write_text(f"{good}\n\n{broken}\n{good}\n", encoding="utf-8")
        message = file_error(path)
        assert "line 3" in message and found in message


def test_the_good_lines_before_a_broken_one_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(f"{json.dumps(raw())}\nbroken\n", encoding="utf-8")
    reader = read_raw(path)
    assert next(reader) == dialogue_from_raw(raw())
    with pytest.raises(DialogueError, match="line 2"):
        next(reader)


def test_a_bad_record_of_a_list_is_named_by_its_number(tmp_path):
    path = tmp_path / "d.json"
    path.write_text(json.dumps([raw(), raw(question=...)]), encoding="utf-8")
    assert "record 1" in file_error(path) and "'question'" in file_error(path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"question": []}', b"3", b"\xff\xfe[]"])
def test_a_file_that_is_no_list_is_an_error(tmp_path, content):
    path = tmp_path / "d.json"
    path.write_bytes(content)
    assert "expected a JSON list" in file_error(path)


def test_a_missing_file_is_an_error(tmp_path):
    for name in ("none.json", "none.jsonl"):
        assert "No such file" in file_error(tmp_path / name)
    assert "expected a JSON list" in file_error(tmp_path)


# ---------------------------------------------------------------------------------------------------- whole or not


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_a_write_that_fails_leaves_the_old_file_as_it_was(tmp_path, name):
    path = tmp_path / name

    def breaks_off():
        yield KITCHEN
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError):
        write_raw(path, breaks_off())
    assert not path.exists()

    write_raw(path, [KITCHEN])
    before = path.read_bytes()
    unwritable = Dialogue("a.mp4", (), (), duration={"not": "a number"})  # type: ignore[arg-type]
    unwritable.duration["itself"] = unwritable.duration  # type: ignore[index]
    with pytest.raises(ValueError, match="Circular"):
        write_raw(path, [KITCHEN, unwritable])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_half_a_character_is_written_as_json_escapes_it(tmp_path):
    write_raw(tmp_path / "d.jsonl", [Dialogue("a.mp4", (Query("half: \ud83e", 1.0),), ())])
    assert [*read_raw(tmp_path / "d.jsonl")][0].queries[0].text == "half: \ud83e"
