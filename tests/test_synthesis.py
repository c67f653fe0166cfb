"""Data made by a model: what is asked, what becomes of the answers, and that nothing is lost or paid for twice."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from llm_server import LLMServer, by_rule, by_turns

from jstream.config import ConfigError
from jstream.data.annotations import Annotations, turns_of_annotation
from jstream.data.dialogue import Dialogue, DialogueError, Query, Response, interval_iou, read_raw, write_raw
from jstream.data.synthesis import job as jobs
from jstream.data.synthesis import prompts
from jstream.data.synthesis.asking import Ask, Dropped
from jstream.data.synthesis.job import Job
from jstream.data.synthesis.live_chats import Moment, _conversation, _draw_fault, _Fault, live_chats
from jstream.data.synthesis.llm import Client, Endpoint, LLMError, Pace, RequestError, Spent
from jstream.data.synthesis.source import AnnotatedVideo, Looks, Segment, annotated_video, evenly
from jstream.data.synthesis.streamo_tasks import captions, grounding, narration, time_sensitive_qa
from jstream.protocols.live import turns_of_chat
from jstream.protocols.protocol import RESPONSE, SILENCE

HELLO = [{"role": "system", "content": prompts.REWRITE.task}, {"role": "user", "content": "1. Hello"}]
COOKING = AnnotatedVideo(
    "cooking.mp4",
    "cooking.mp4",
    tuple(Segment(f"step {n}", 20.0 * n + 4, 20.0 * n + 14) for n in range(10)),
    duration=220.0,
    source="hand",
)


@pytest.fixture
def server():
    with LLMServer() as server:
        yield server


def endpoint(server, folder, **changes):
    return Endpoint(server.url, "stub", str(folder / "cache"), **{"back_off": 0.01, "timeout": 0.3} | changes)


def ask(server, folder, **changes):
    return Ask(Client(endpoint(server, folder, **changes)))


def one_paid_each(server):
    return server.answered and set(server.answered.values()) == {1}


@pytest.fixture(scope="module")
def youcook(shared_data, tmp_path_factory):
    """The raw schema of real annotations: 24 videos."""
    videos = json.loads((shared_data / "annotations/youcook2/yc2_val.json").read_text())
    dialogues = []
    for name, video in sorted(videos.items())[:24]:
        steps = zip(video["timestamps"], video["sentences"], strict=True)
        said = tuple(Response(text, start=max(1.0, a), end=b) for (a, b), text in steps)
        dialogues.append(Dialogue(f"/videos/{name}.mp4", (), said, "event_caption", "YouCook2", video["duration"]))
    write_raw(path := tmp_path_factory.mktemp("youcook") / "in.jsonl", dialogues)
    return path


def job_of(server, annotations, out, kind="live_chats", seed=0, **changes):
    return Job(kind, str(annotations), str(out), endpoint(server, out.parent, **changes), seed)


def outputs(out):
    return out.read_bytes(), out.with_suffix(".skipped.jsonl").read_bytes()


@pytest.fixture(scope="module")
def well_behaved(youcook):
    """What a job gives that meets no fault, and the requests that it takes."""
    with LLMServer() as server:
        jobs.run(job_of(server, youcook, youcook.parent / "chats.jsonl"), workers=2)
    assert one_paid_each(server)
    return outputs(youcook.parent / "chats.jsonl"), server.answered


# --------------------------------------------------------------------------------------------------------- the client


def test_an_answer_is_paid_for_once_whoever_asks_again(server, tmp_path):
    spent = Spent()
    first = Client(endpoint(server, tmp_path)).complete(HELLO, spent, seed=1)
    assert first == Client(endpoint(server, tmp_path)).complete(HELLO, spent, seed=1)  # as a process that came later
    assert first.text == '{"lines": ["You Hello."]}'
    assert spent == Spent(paid=1, cached=1, tokens_in=8, tokens_out=25, cached_in=8, cached_out=25)
    assert spent.cost(2.0, 4.0) == pytest.approx((116e-6, 116e-6))
    assert server.asked.total() == 1


def test_another_seed_model_or_parameter_is_another_request(server, tmp_path):
    client, spent = Client(endpoint(server, tmp_path)), Spent()
    client.complete(HELLO, spent, seed=1)
    client.complete(HELLO, spent, seed=2)
    Client(endpoint(server, tmp_path, options={"temperature": None})).complete(HELLO, spent, seed=1)
    Client(dataclasses.replace(endpoint(server, tmp_path), model="other")).complete(HELLO, spent, seed=1)
    assert (spent.paid, spent.cached, len(server.answered)) == (4, 0, 4)


def test_equal_requests_at_the_same_time_are_paid_for_once(tmp_path):
    slow = lambda *asked: time.sleep(0.1) or by_rule(*asked)
    with LLMServer(rule=slow) as server, concurrent.futures.ThreadPoolExecutor(8) as pool:
        clients = [Client(endpoint(server, tmp_path)) for _ in range(2)]
        answers = list(pool.map(lambda n: clients[n % 2].complete(HELLO, Spent(), seed=1), range(8)))
    assert len(set(answers)) == 1 and server.asked.total() == 1


@pytest.mark.parametrize(
    "fault", ["429", "500", "503", "timeout", "dropped", "malformed", "no completion", "too large"]
)
def test_what_may_pass_is_tried_again(tmp_path, fault):
    with LLMServer(schedule=lambda number: fault if number < 2 else None) as server:
        spent = Spent()
        answer = Client(endpoint(server, tmp_path)).complete(HELLO, spent, seed=1)
    assert answer.text == '{"lines": ["You Hello."]}'
    assert (spent.paid, spent.failures, server.asked.total(), server.answered.total()) == (1, 2, 3, 1)


def test_retry_after_is_honoured_as_far_as_it_is_bounded(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(Client, "_sleep", lambda self, seconds: waits.append(seconds))
    with LLMServer(schedule=lambda number: "429" if number < 1 else None) as server:
        for said in ("7", "1000000", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-3"):
            server.number, server.retry_after = 0, said
            Client(endpoint(server, tmp_path)).complete(HELLO, Spent(), seed=len(waits))
    between = waits[1::3]
    assert between[:2] == [7.0, 120.0]
    assert all(0.005 <= wait <= 0.01 for wait in between[2:])  # the back-off's own, with its jitter


def test_waiting_doubles_and_ends(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(Client, "_sleep", lambda self, seconds: waits.append(seconds))
    with LLMServer(schedule=lambda number: "500") as server, pytest.raises(LLMError) as caught:
        Client(endpoint(server, tmp_path, retries=9, back_off=1.0)).complete(HELLO, Spent(), seed=1)
    assert "found 10 failures" in str(caught.value) and "500 this is a 500" in str(caught.value)
    waits = waits[1::2]
    assert len(waits) == 9 and all(min(2**n, 120) / 2 <= wait <= min(2**n, 120) for n, wait in enumerate(waits))


@pytest.mark.parametrize(
    ("status", "kind"), [("400", RequestError), ("401", LLMError), ("404", LLMError), ("302", LLMError)]
)
def test_what_does_not_pass_is_an_error_at_once_in_one_line(tmp_path, monkeypatch, status, kind):
    monkeypatch.setenv("OPENAI_API_KEY", "this")  # and does not show
    with LLMServer(schedule=lambda number: status) as server, pytest.raises(LLMError) as caught:
        Client(endpoint(server, tmp_path)).complete(HELLO, Spent(), seed=1)
    assert type(caught.value) is kind and server.asked.total() == 1
    assert str(caught.value) == f"{server.url}/chat/completions: expected an answer, found {status} … is a {status}"
    assert server.headers["Authorization"] == "Bearer this"


def test_nothing_that_listens_is_an_error_in_one_line(server, tmp_path):
    server.stop()
    with pytest.raises(LLMError, match="found 3 failures, the last of them: .*Connection refused; start again"):
        Client(endpoint(server, tmp_path, retries=2)).complete(HELLO, Spent(), seed=1)


def test_a_server_that_drips_is_cut_off(tmp_path):
    with LLMServer(schedule=lambda number: "drip") as server, pytest.raises(LLMError, match="timed out"):
        Client(endpoint(server, tmp_path, timeout=0.1, retries=0)).complete(HELLO, Spent(), seed=1)


def test_a_damaged_cache_is_asked_for_again(server, tmp_path):
    client, spent = Client(endpoint(server, tmp_path)), Spent()
    client.complete(HELLO, spent, seed=1)
    (file,) = (tmp_path / "cache").glob("*/*.json")
    for damage in (b"", b"{", b"[]", b'{"text": 3}', b'{"text": "x", "tokens_in": -1}', b'{"words": "x"}'):
        file.write_bytes(damage)
        assert client.complete(HELLO, spent, seed=1).text == '{"lines": ["You Hello."]}'
    assert (spent.paid, spent.cached) == (7, 0)


def test_a_seed_that_an_endpoint_does_not_know_is_not_sent(tmp_path):
    seeds = []
    with LLMServer(rule=lambda *asked: seeds.append(asked[3]) or by_rule(*asked)) as server:
        client, spent = Client(endpoint(server, tmp_path, options={"seed": None})), Spent()
        client.complete(HELLO, spent, seed=1)
        client.complete(HELLO, spent, seed=2)
    assert seeds == [None, None] and spent.paid == 2


def test_requests_begin_at_an_even_pace():
    now = [100.0]
    pace = Pace(120, clock=lambda: now[0])
    assert [pace.turn() for _ in range(3)] == [0.0, 0.5, 1.0]
    now[0] = 105.0
    assert [pace.turn() for _ in range(2)] == [0.0, 0.5]
    assert [Pace(None).turn() for _ in range(2)] == [0.0, 0.0]


@pytest.mark.parametrize(
    "changes",
    [
        {"url": url}
        for url in ("ftp://host/v1", "file:///etc/passwd", "host:80", "http://", "http://a:b@host", "http://h:x")
    ]
    + [{"model": ""}, {"retries": -1}, {"timeout": 0}, {"timeout": float("nan")}, {"requests_a_minute": 0}],
)
def test_an_endpoint_that_cannot_be_is_refused(changes):
    with pytest.raises(ConfigError):
        Endpoint(**{"url": "https://host/v1", "model": "m", "cache": "c"} | changes)


def test_a_key_that_would_forge_a_header_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a\r\nHost: b")
    with pytest.raises(ConfigError, match="printable"):
        Client(endpoint(server, tmp_path))


# ------------------------------------------------------------------------------------------------- prompts and answers


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"content": None, "refusal": "I'd rather\nnot."}, 'refused: "I\'d rather not."'),
        ({"content": "I cannot help with that."}, 'unparsable: expected {"lines": ["text", …]}, found \'I cannot help'),
        ({"content": '{"lines": ["x"]} Done!'}, "unparsable"),
        ({"content": '{"lines": "x"}'}, "unparsable"),
        ({"content": '{"lines": ["x", 3]}'}, "unparsable"),
        ({"content": "[" * 100_000}, "unparsable"),
        ({"content": '{"lines": ["x", "y"]}'}, "expected 1 lines, found 2"),
        ({"content": '{"lines": ["x', "finish_reason": "length"}, "cut off after 13 tokens"),
        ({"content": "", "finish_reason": "content_filter"}, "refused: 'filtered'"),
    ],
)
def test_an_answer_that_cannot_be_used_is_asked_for_once_more_and_dropped_with_its_reason(tmp_path, answer, why):
    seeds = []
    rule = lambda system, said, images, seed: seeds.append(seed) or dict(answer)
    with LLMServer(rule=rule) as server:
        for _ in range(2):  # the second time from the cache: it was paid for, and a restart does not pay again
            with pytest.raises(Dropped) as caught:
                ask(server, tmp_path).lines(prompts.REWRITE, ["note"])
            assert str(caught.value).startswith(why) and "\n" not in str(caught.value)
    assert seeds == [0, 1]


def test_a_second_seed_may_answer_what_the_first_refused(tmp_path):
    refuses = lambda *asked: by_rule(*asked) if asked[3] == 1 else {"refusal": "no"}
    with LLMServer(rule=refuses) as server:
        asking = ask(server, tmp_path)
        assert asking.lines(prompts.REWRITE, ["a {brace}", "b"]) == ["You a {brace}.", "You b."]
    assert asking.spent.paid == 2


def test_a_request_that_is_refused_is_dropped_at_once(tmp_path):
    with LLMServer(schedule=lambda number: "413") as server, pytest.raises(Dropped, match="413"):
        ask(server, tmp_path).lines(prompts.REWRITE, ["a"])
    assert server.asked.total() == 1


def test_many_lines_are_asked_for_some_at_a_time(server, tmp_path):
    notes = [f"note {n}" for n in range(70)]
    assert ask(server, tmp_path).lines(prompts.REWRITE, notes) == [f"You {note}." for note in notes]
    assert server.asked.total() == 3


# -------------------------------------------------------------------------------------------------------------- chats


def test_every_query_is_answered_at_once_and_at_every_later_change(server, tmp_path):
    changes = sorted({2 * int(t) - 1 for segment in COOKING.segments for t in (segment.start, segment.end)})
    numbers = collections.Counter()
    for seed in range(12):
        with contextlib.suppress(Dropped):  # of less than 60 s
            chat = live_chats(COOKING, ask(server, tmp_path), random.Random(seed), faults=0)
            shift = round(chat["start"] * 2)
            turns = turns_of_chat(chat["conversation"])
            queries = {i + shift: turn.query for i, turn in enumerate(turns) if turn.query}
            replies = {i + shift: turn.reply for i, turn in enumerate(turns) if turn.reply}
            numbers[len(queries)] += 1
            assert set(queries.values()) <= {*prompts.PAST, *prompts.PRESENT, *prompts.FUTURE}
            for frame, reply in replies.items():
                begun = [s for s in COOKING.segments if 2 * s.start - 1 <= frame]
                open_queries = [query for asked, query in sorted(queries.items()) if asked <= frame]
                said = [f"{len(begun)} notes on {query!r}; You {begun[-1].text}." for query in open_queries]
                assert all(part in reply for part in said[-1:]) and set(reply.split(". ")) <= {
                    s.rstrip(".") for s in said
                } | set(said)
            begins = [f for f in changes if f > min(queries) and (f + 1) / 2 % 20 == 4]  # there the answers change
            assert set(queries) | set(begins) <= set(replies) <= set(queries) | set(changes)
            assert 0 <= min(queries) - shift <= 20
            assert all(turn.learn_reply for turn in turns if turn.reply)
            assert [turn.learn_state for turn in turns] == [turn.query is None for turn in turns]
    assert set(numbers) == {1, 2, 3}


def test_an_answer_knows_only_what_has_begun(tmp_path):
    seen = []
    rule = lambda system, said, *rest: seen.append(said[0]) or by_rule(system, said, *rest)
    with LLMServer(rule=rule) as server:
        live_chats(COOKING, ask(server, tmp_path), random.Random(0), faults=0)
    notes = [asked for asked in seen if asked.startswith("Up to now")]
    assert len(notes) > 10
    for asked in notes:
        known = [n for n in range(10) if f"You step {n}." in asked]
        assert known == list(range(len(known)))
        assert asked.count("still going on") <= 1
    assert any("still going on" in asked for asked in notes) and not any(":" in n.split("\n\n")[0][10:] for n in notes)


@pytest.mark.parametrize("leak", ["It takes a few seconds.", "You did that 12s ago.", "At 1:05 you stirred."])
def test_a_chat_that_leaks_a_time_is_dropped(tmp_path, leak):
    rule = lambda system, *rest: (
        json.dumps({"answer": leak}) if system.startswith(prompts.CHAT_ANSWER.task) else by_rule(system, *rest)
    )
    with LLMServer(rule=rule) as server, pytest.raises(Dropped, match="leaks a time"):
        live_chats(COOKING, ask(server, tmp_path), random.Random(0))


@pytest.mark.parametrize("stretch", [0.2, 30.0])
def test_a_chat_that_is_too_short_or_too_long_is_dropped_before_anything_is_paid_for(server, tmp_path, stretch):
    segments = tuple(Segment(s.text, s.start * stretch, s.end * stretch) for s in COOKING.segments)
    with pytest.raises(Dropped, match="expected a chat of 60 to 3600 s"):
        live_chats(AnnotatedVideo("v", "v", segments), ask(server, tmp_path), random.Random(0))
    assert not server.asked


def test_what_training_would_cut_off_is_not_paid_for(server, tmp_path):
    segments = tuple(Segment(s.text, s.start * 10, s.end * 10) for s in COOKING.segments)
    chat = live_chats(AnnotatedVideo("v", "v", segments), ask(server, tmp_path), random.Random(3), max_frames=1200)
    assert sum(m["num_frames"] for m in chat["conversation"] if m["role"] == "stream") <= 1200


MOMENTS = {5: Moment("Why?", "A."), 12: Moment(reply="B."), 20: Moment(reply="C.")}


def test_a_wrong_answer_is_put_right_and_not_learned():
    turns = turns_of_chat(_conversation(MOMENTS, 2, _Fault(12, "C.", "Sorry: B.", 3)))
    said = {i + 2: (t.query, t.reply, t.learn_reply) for i, t in enumerate(turns) if t.state == RESPONSE}
    assert said == {
        5: ("Why?", "A.", True),
        12: (None, "C.", False),
        15: (None, "Sorry: B.", True),
        20: (None, "C.", True),
    }
    # speaking at 12 was right, and silence at 13 and 14, in place of a correction, was not
    assert [i + 2 for i, t in enumerate(turns) if not t.learn_state] == [5, 13, 14]


def test_a_missed_answer_is_given_late_and_its_absence_not_learned():
    turns = turns_of_chat(_conversation(MOMENTS, 2, _Fault(12, None, "B.", 2)))
    assert {i + 2: t.reply for i, t in enumerate(turns) if t.state == RESPONSE} == {5: "A.", 14: "B.", 20: "C."}
    assert turns[10].state == SILENCE and [i + 2 for i, t in enumerate(turns) if not t.learn_state] == [5, 12, 13]


def test_faults_are_drawn_where_there_is_room_to_put_them_right():
    drawn = [_draw_fault(MOMENTS, random.Random(seed)) for seed in range(100)]
    assert {fault.frame for fault in drawn} == {5, 12} and {fault.delay for fault in drawn} == {1, 2, 3, 4}
    assert not any(fault.said is None for fault in drawn if fault.frame == 5)  # a query is always answered
    assert {fault.said for fault in drawn if fault.frame == 12} == {None, "A.", "C."}
    assert _draw_fault({5: Moment("Why?", "A."), 6: Moment(reply="B.")}, random.Random(0)) is None
    assert _draw_fault({5: Moment("Why?", "A.")}, random.Random(0)) is None


# ------------------------------------------------------------------------------------------------------ Streamo's tasks


def pancake(shared_data, *segments):
    path = str(shared_data / "videos/decord/flipping_a_pancake.mkv")  # 10.3 s
    return AnnotatedVideo(path, "pancake.mkv", segments, source="decord")


def test_narration_is_of_adjacent_pictures_and_what_cleaning_rejects_is_not_said(server, tmp_path, shared_data):
    (made,), reasons = narration(
        pancake(shared_data), ask(server, tmp_path), random.Random(0), Looks(max_pixels=10_000)
    )
    assert (made.video, made.task, made.source, made.queries[0].time) == ("pancake.mkv", "narration", "decord", 1.0)
    assert made.queries[0].text in prompts.NARRATE and not reasons
    # 11 pictures make 10 pairs, at seconds 1 to 10, in turns 2 to 11; the stub rejects every fourth line
    assert [response.time for response in made.responses] == [2, 3, 4, 6, 7, 8, 10, 11]
    assert server.asked.total() == 11


def test_a_pair_that_is_refused_is_left_out_of_the_narration_with_its_reason(tmp_path, shared_data):
    calls = collections.Counter()

    def rule(system, said, images, seed):
        calls[len(images)] += 1
        return {"refusal": "no"} if calls[2] in (3, 4) and images else by_rule(system, said, images, seed)

    with LLMServer(rule=rule) as server:
        (made,), reasons = narration(pancake(shared_data), ask(server, tmp_path), random.Random(0), Looks(5, 5_000))
    assert [response.time for response in made.responses] == [2, 3, 5]
    assert reasons == ["second 3: refused: 'no'"]


def test_captions_are_kept_where_they_are_found_again(server, tmp_path, shared_data):
    source = pancake(
        shared_data,
        Segment("exactly, 2 3", 3, 3),  # turn 3 shows seconds 2 to 3
        Segment("near enough, 4 8", 6, 8),  # 5 to 8: IoU 3/4
        Segment("elsewhere, 0 3", 5, 7),
        Segment("nowhere", 9, 10),
        Segment("behind the end", 30, 40),
    )
    made, reasons = captions(source, ask(server, tmp_path), random.Random(0), Looks(max_pixels=10_000))
    assert [dialogue.task for dialogue in made] == ["event_caption", "action_caption"]
    for dialogue in made:
        assert dialogue.responses == (
            Response("Seen: exactly, 2 3", start=3, end=3),
            Response("Seen: near enough, 4 8", start=6, end=8),
        )
    assert [reason.split(": ")[0] for reason in reasons[:3]] == [
        f"event_caption, {s} s" for s in ("5 to 7", "9 to 10", "30 to 40")
    ]
    assert "found at 0 to 3 s, IoU 0.00, expected 0.5" in reasons[0] and "found at nowhere" in reasons[1]
    strict, _ = captions(source, ask(server, tmp_path), random.Random(0), Looks(max_pixels=10_000), iou=0.8)
    assert [len(dialogue.responses) for dialogue in strict] == [1, 1]
    assert one_paid_each(server)  # a stricter threshold asks nothing new


def test_a_query_for_an_event_comes_before_it_or_after_it(server, tmp_path):
    again = Segment("step again", 204, 210)
    twice = Segment("the same", 212, 214), Segment("the same", 216, 218)
    source = dataclasses.replace(COOKING, segments=(*COOKING.segments, again, *twice))
    made, reasons = grounding(source, ask(server, tmp_path), random.Random(1))
    assert len(made) == 10 and {d.task for d in made} == {"forward_grounding", "backward_grounding"}
    for dialogue, segment in zip(made, COOKING.segments, strict=True):
        (query,), (response,) = dialogue.queries, dialogue.responses
        assert response.text == f"From {segment.start:g}s to {segment.end:g}s."
        if dialogue.task == "forward_grounding":
            assert query.text == f"Tell me when this: {segment.text}" and 1 <= query.time < segment.start
            assert (response.start, response.end) == (segment.start, segment.end)
        else:
            assert query.text == f"When did this: {segment.text}" and segment.end < query.time <= 220
            assert response.time == query.time
    assert [reason.split(": ")[1] for reason in reasons] == ["the query fits other events as well"] + 2 * [
        "another event has the same caption"
    ]


def test_a_question_is_answered_where_its_answer_changes(server, tmp_path):
    # the stub knows "0" from the second step on, and counts up at every second one
    at = {34.0: "0", 54.0: "1", 94.0: "2", 134.0: "3", 174.0: "4"}
    for seed in range(20):
        (made,), _ = time_sensitive_qa(COOKING, ask(server, tmp_path), random.Random(seed))
        (query,) = made.queries
        assert made.task == "tsqa" and query.text == "How many so far?" and 1 <= query.time < 174
        later = [(time, text) for time, text in at.items() if time > query.time]
        at_once = [(query.time, text) for time, text in at.items() if time <= query.time][-1:]
        assert [(r.time, r.text) for r in made.responses] == at_once + later
    assert server.asked.total() == 1


def test_a_question_whose_answer_never_changes_is_dropped(tmp_path):
    rule = lambda *asked: json.dumps({"question": "What?", "answers": ["", *["the same"] * 9]})
    with LLMServer(rule=rule) as server, pytest.raises(Dropped, match="expected an answer that changes, found 1"):
        time_sensitive_qa(COOKING, ask(server, tmp_path), random.Random(0))


def test_a_video_that_cannot_be_read_is_dropped_with_its_reason(server, tmp_path, shared_data):
    for path in ("videos/moviepy/result.webm", "videos/nowhere.mp4"):
        source = AnnotatedVideo(str(shared_data / path), "v", (Segment("x", 1, 2),))
        with pytest.raises(Dropped, match=pathlib.Path(path).name):
            captions(source, ask(server, tmp_path), random.Random(0), Looks())
    assert not server.asked


def test_spans_overlap_as_they_should():
    assert interval_iou((0, 4), (2, 6)) == pytest.approx(1 / 3) and interval_iou((0, 4), (0, 4)) == 1
    assert interval_iou((0, 1), (2, 3)) == interval_iou((2, 2), (2, 2)) == interval_iou((3, 1), (1, 3)) == 0
    assert evenly(3, 20, 4) == [3, 9, 14, 20] and evenly(3, 5, 8) == [3, 4, 5] and evenly(3, 9, 1) == [3]


# ---------------------------------------------------------------------------------------------------------- whole jobs


@pytest.mark.parametrize("kind", jobs.KINDS)
def test_what_is_made_reads_as_annotations(server, tmp_path, shared_data, kind):
    video = "pancake.mkv"  # what is drawn depends on the name
    (tmp_path / video).symlink_to(shared_data / "videos/decord/flipping_a_pancake.mkv")
    steps = tuple(Response(f"step {n}, {3 * n} {3 * n + 2}", start=3 * n + 1, end=3 * n + 2) for n in range(3))
    long = tuple(dataclasses.replace(r, start=60 * r.start, end=60 * r.end) for r in steps)
    dialogues = [Dialogue(video, (Query("?", 1),), long if kind == "live_chats" else steps, "event_caption", "hand")]
    write_raw(tmp_path / "in.jsonl", dialogues)
    out = tmp_path / "elsewhere" / "made.jsonl"
    outcome = jobs.run(dataclasses.replace(job_of(server, tmp_path / "in.jsonl", out, kind), looks=Looks(20, 5_000)))
    made = Annotations(out)
    assert outcome.made == len(made) >= 1 and outcome.spent.paid == server.answered.total()
    for annotation in made:
        assert pathlib.Path(annotation.video).samefile(shared_data / "videos/decord/flipping_a_pancake.mkv")
        turns = turns_of_annotation(annotation, annotation.num_frames or 11, 1.0)
        assert any(turn.state == RESPONSE for turn in turns) and any(turn.query for turn in turns)
    if kind != "live_chats":
        assert len(list(read_raw(out))) == outcome.made


def test_chats_of_real_annotations_come_in_order_with_reasons_for_what_is_not_there(youcook, well_behaved):
    made, skipped = (list(map(json.loads, lines.splitlines())) for lines in well_behaved[0])
    videos = [annotation.video for annotation in Annotations(youcook)]
    places = [videos.index(record["video"]) for record in made]
    assert places == sorted(places) and len(places) >= 12
    assert sorted(places + [line["record"] for line in skipped]) == list(range(24))
    assert all(line["why"].startswith("expected a chat of 60 to 3600 s") for line in skipped)


def test_faults_change_nothing_and_nothing_is_paid_for_twice(youcook, tmp_path, well_behaved):
    out = tmp_path / "bad" / "chats.jsonl"
    with LLMServer(schedule=by_turns) as server:
        server.slow = 0.2
        outcome = jobs.run(job_of(server, youcook, out, timeout=0.1), workers=8)
    assert (outputs(out), server.answered) == well_behaved
    assert (
        outcome.spent.paid == server.answered.total()
        and outcome.spent.failures == server.number - outcome.spent.paid > 30
    )
    assert sorted(os.listdir(out.parent)) == ["cache", "chats.jsonl", "chats.skipped.jsonl"]


def test_another_seed_makes_other_chats_and_the_same_record_twice_is_asked_for_once(youcook, tmp_path, well_behaved):
    first = youcook.read_text().splitlines()[0] + "\n"
    (tmp_path / "in.jsonl").write_text(2 * first)
    with LLMServer() as server:
        jobs.run(job_of(server, tmp_path / "in.jsonl", tmp_path / "same.jsonl"))
        jobs.run(job_of(server, tmp_path / "in.jsonl", tmp_path / "other.jsonl", seed=1))
    chat = well_behaved[0][0].splitlines()[0]  # wherever a record stands, it gives the same
    assert (tmp_path / "same.jsonl").read_bytes().splitlines() == [chat, chat]
    assert chat not in (tmp_path / "other.jsonl").read_bytes() and one_paid_each(server)


def test_a_request_that_fails_while_others_are_answered_is_left_out_and_tried_by_the_next_run(youcook, tmp_path):
    poison = "combine kimchi"  # of the first record
    rule = lambda *asked: {"fault": "500"} if poison in asked[1][0] and server.poisoned else by_rule(*asked)
    out = tmp_path / "chats.jsonl"
    with LLMServer(rule=rule) as server:
        server.poisoned = True
        first = jobs.run(job := job_of(server, youcook, out, retries=4), workers=2)
        assert poison in next(open(youcook)) and "found 5 failures" in out.with_suffix(".skipped.jsonl").read_text()
        server.poisoned = False
        second = jobs.run(job, workers=2)
    assert (second.made, second.skipped) == (first.made + 1, first.skipped - 1) and one_paid_each(server)


def test_an_endpoint_that_dies_and_comes_back_is_waited_for(youcook, tmp_path, well_behaved):
    def dies(number):
        if number == 40:
            threading.Thread(target=server.stop).start()
            threading.Timer(0.3, server.start).start()

    out = tmp_path / "bad" / "chats.jsonl"
    with LLMServer(on_answer=dies) as server:
        outcome = jobs.run(job_of(server, youcook, out, back_off=0.05), workers=4)
    assert (outputs(out), server.answered) == well_behaved
    assert outcome.spent.failures > 0


def test_an_endpoint_that_stays_dead_ends_the_job_which_goes_on_later(youcook, tmp_path, well_behaved):
    out = tmp_path / "bad" / "chats.jsonl"
    with LLMServer(on_answer=lambda number: number == 60 and threading.Thread(target=server.stop).start()) as server:
        job = job_of(server, youcook, out, retries=2)
        with pytest.raises(LLMError, match="start again when it answers"):
            jobs.run(job, workers=3)
        assert sorted(os.listdir(out.parent)) == ["cache", "chats.jsonl.progress"]
        server.start()
        outcome = jobs.run(job, workers=3)
    assert (outputs(out), server.answered) == well_behaved
    assert outcome.spent.paid + outcome.spent.cached >= server.answered.total()


def command(job, *more):
    flags = [f"--kind={job.kind}", f"--annotations={job.annotations}", f"--out={job.out}", f"--llm={job.endpoint.url}"]
    flags += ["--llm_model=stub", f"--cache={job.endpoint.cache}", "--back_off=0.01", *more]
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1]), "no_proxy": "127.0.0.1"}
    return subprocess.Popen(
        [sys.executable, "-m", "jstream.data.synthesis", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def test_a_job_that_is_killed_goes_on_where_it_was(youcook, tmp_path, well_behaved):
    out = tmp_path / "bad" / "chats.jsonl"
    killed = []

    def kills(number):
        if number == 100 and not killed:
            killed.append(process.send_signal(signal.SIGKILL))

    with LLMServer(on_answer=kills) as server:
        process = command(job := job_of(server, youcook, out), "--workers=2")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL and not out.exists()
        done = len((out.parent / "chats.jsonl.progress").read_bytes().splitlines())
        with (out.parent / "chats.jsonl.progress").open("a") as file:
            file.write('{"key": "half a li')
        again = command(job, "--workers=2", "--price_in=2", "--price_out=8")
        said, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert outputs(out) == well_behaved[0] and set(server.answered) == set(well_behaved[1])
    assert done >= 1  # records that were whole are not even asked of the cache
    # what was under way when it was killed, and no more, is paid for again
    assert sum(number - 1 for number in server.answered.values()) <= 2
    paid = int(said.split("paid for: ")[1].split()[0])
    cached = int(said.split("cached: ")[1].split()[0])
    assert paid + cached >= len(server.answered) and f"{out}: " in said


def test_where_nothing_can_be_made_there_is_no_file_but_a_reason(server, tmp_path):
    write_raw(tmp_path / "in.jsonl", [Dialogue("v.mp4", (), ())])
    job = job_of(server, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "grounding")
    with pytest.raises(DialogueError, match="found none: expected annotated segments, found none"):
        jobs.run(job)
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "out.jsonl.progress").exists()
    assert json.loads((tmp_path / "out.skipped.jsonl").read_text())["video"] == "v.mp4"


def test_chats_and_replies_at_a_moment_are_sources_as_well(tmp_path):
    stream = {"role": "stream", "num_frames": 6, "learn": True}
    chat = {"video": "v.mp4", "start": 10.0, "conversation": [stream, {"role": "assistant", "content": "A."}] * 2}
    (tmp_path / "in.json").write_text(json.dumps([chat]))
    (annotation,) = Annotations(tmp_path / "in.json")
    assert annotated_video(annotation, "v").segments == (Segment("A.", 13.0, 13.0), Segment("A.", 16.0, 16.0))
    said = (Response("moment", time=4), Response("past the end", start=9, end=12), Response("behind it", time=11))
    annotation = dataclasses.replace(annotation, said=Dialogue("v", (), said, source="s"), duration=10.0)
    source = annotated_video(annotation, "v")
    assert source.segments == (Segment("moment", 4, 4), Segment("past the end", 9, 10)) and source.source == "s"


@pytest.mark.may_skip("Apache Beam is an extra")
def test_beam_makes_the_same(youcook, tmp_path, well_behaved):
    pytest.importorskip("apache_beam")
    out = tmp_path / "beam" / "chats.jsonl"
    with LLMServer(schedule=by_turns) as server:
        server.slow = 0.2
        job = job_of(server, youcook, out, timeout=0.1)
        outcome = jobs.run(job, beam_options="--runner=DirectRunner")
        assert (outputs(out), server.answered) == well_behaved
        assert outcome.spent.paid == server.answered.total() and outcome.spent.failures > 30
        assert sorted(os.listdir(out.parent)) == ["cache", "chats.jsonl", "chats.skipped.jsonl"]
        server.schedule = lambda number: "401"
        with pytest.raises(LLMError, match="the pipeline failed: .*401"):
            jobs.run(dataclasses.replace(job, seed=1), beam_options="--runner=DirectRunner")


def test_two_jobs_do_not_write_one_file(server, tmp_path):
    write_raw(tmp_path / "in.jsonl", [Dialogue("v.mp4", (), ())])
    job = job_of(server, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "grounding")
    with contextlib.closing(jobs.Progress(tmp_path / "out.jsonl.progress")):
        with pytest.raises(DialogueError, match="expected no other job here"):
            jobs.run(job)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "poems"},
        {"out": "out.json"},
        {"out": "in.jsonl"},
        {"iou": 2},
        {"seed": -1},
        {"looks": Looks(quality=99)},
    ],
)
def test_a_job_that_cannot_be_is_refused(server, tmp_path, changes):
    with pytest.raises(ConfigError):
        Job(
            **{"kind": "grounding", "annotations": "in.jsonl", "out": "o.jsonl", "endpoint": endpoint(server, tmp_path)}
            | changes
        )
