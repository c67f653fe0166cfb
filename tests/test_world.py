"""The world: scenes, pictures, dialogues and files."""

import collections
import itertools
import json
import math
import subprocess
import sys

import av
import numpy as np
import pytest

from jstream.data import dialogue as dialogues_io
from jstream.data import world as worlds

MANY = [worlds.make_world(11, index) for index in range(150)]


def dialogues_of(task, count=150):
    """Dialogues of a task with their worlds."""
    made = ((w, worlds.make_dialogue(w, task, worlds.generator(w.seed, w.index, 5))) for w in MANY[:count])
    return [(world, dialogue) for world, dialogue in made if dialogue is not None]


def given_frame(response):
    """The frame a reply is given in."""
    return int(response.time) - 1 if response.end is None else int(response.end)


def states(dialogue):
    """The state of every frame, as a conversion to turns would give it."""
    frames = ["silence"] * int(dialogue.duration)
    for response in dialogue.responses:
        if response.end is not None:
            for frame in range(int(response.start) - 1, int(response.end)):
                frames[frame] = "standby"
    for response in dialogue.responses:
        assert frames[given_frame(response)] != "response", "two replies in one frame"
        frames[given_frame(response)] = "response"
    return frames


# ------------------------------------------------------------------------------------------------- scenes


def test_a_world_is_the_same_every_time():
    assert worlds.make_world(3, 7) == worlds.make_world(3, 7)
    assert worlds.make_world(3, 7) != worlds.make_world(3, 8)
    assert worlds.make_world(3, 7) != worlds.make_world(4, 7)


def test_a_frame_is_the_same_every_time_and_in_any_order():
    world = worlds.make_world(3, 7)
    frame = worlds.Renderer(world, 64)(2.5)
    assert frame.shape == (64, 64, 3) and frame.dtype == np.uint8
    draw = worlds.Renderer(worlds.make_world(3, 7), 64)
    draw(9.0)
    np.testing.assert_array_equal(draw(2.5), frame)
    assert (draw(2.501) != frame).any()  # noise belongs to the moment


def test_durations_fill_their_range_and_limits_hold():
    durations = [w.duration for w in MANY]
    assert min(durations) >= 20 and max(durations) <= 120
    assert 40 < np.median(durations) < 60  # log-uniform: the geometric mean is 49
    config = worlds.WorldConfig(min_seconds=12, max_seconds=12)
    assert worlds.make_world(0, 0, config).duration == 12
    with pytest.raises(ValueError, match="min_seconds"):
        worlds.WorldConfig(min_seconds=30, max_seconds=20)


def test_a_name_belongs_to_one_object_of_the_video():
    for world in MANY:
        owners = {}
        for index, thing in enumerate(world.objects):
            events = [world.events[n] for n in thing.events]
            for colour in (thing.colour, *(e.after for e in events if e.verb == "colour")):
                assert owners.setdefault((colour, thing.kind), index) == index
        for number, event in enumerate(world.events):
            thing = world.objects[event.subject]
            assert number in thing.events
            assert event.name == f"{world.colour_at(event.subject, event.start_frame)} {thing.kind}"
            if event.partner is not None:
                partner = world.objects[event.partner]
                assert event.detail == f"{world.colour_at(event.partner, event.start_frame)} {partner.kind}"


def test_every_verb_happens_and_events_come_about_every_six_seconds():
    verbs = collections.Counter(e.verb for w in MANY for e in w.events)
    assert set(verbs) == set(worlds.VERBS)
    assert min(verbs.values()) > 0.05 * sum(verbs.values())
    assert 5 < sum(w.duration for w in MANY) / sum(verbs.values()) < 7


def test_an_event_is_in_progress_at_its_start_frame_and_over_at_its_end_frame():
    for event in (e for w in MANY for e in w.events):
        assert (4 if event.partner is not None else 2) <= event.end_frame - event.start_frame <= 6
        assert 0.6 <= event.start_frame - event.begin <= 0.9
        assert 0.6 <= event.end_frame - event.finish <= 0.9
        assert (event.start, event.end) == (event.start_frame + 1, event.end_frame)
    assert all(e.end_frame <= w.duration - 1 for w in MANY for e in w.events)
    assert all(len({e.end_frame for e in w.events}) == len(w.events) for w in MANY)


def test_an_object_does_one_thing_at_a_time_and_at_most_three_events_overlap():
    for world in MANY:
        for index in range(len(world.objects)):
            events = [e for e in world.events if index in (e.subject, e.partner)]
            for first, second in itertools.pairwise(events):
                assert second.begin - first.finish >= 1
        for frame in range(world.duration):
            assert sum(e.start_frame <= frame < e.end_frame for e in world.events) <= 3
            assert 2 <= sum(world.pose(i, frame) is not None for i in range(len(world.objects))) <= 5


def test_resting_objects_do_not_overlap():
    for world in MANY:
        for frame in range(0, world.duration, 5):
            poses = [world.pose(i, frame) for i in range(len(world.objects))]
            at_rest = [p for p, o in zip(poses, world.objects) if p and p.layer == 1 and (p.x, p.y) == o.home]
            for a, b in itertools.combinations(at_rest, 2):
                assert math.dist((a.x, a.y), (b.x, b.y)) > a.radius + b.radius


def test_sentences_say_what_happens():
    sentences = {e.verb: (e.sentence, e.action, e) for w in MANY for e in w.events}
    sentence, action, event = sentences["colour"]
    assert sentence == f"The {event.before} {event.name.split()[1]} turns {event.after}."
    assert action == f"Turns {event.after}."
    assert sentences["jump"][1] == "Jumps."
    assert " crosses from " in sentences["cross"][0] and " to " in sentences["cross"][0]
    assert sentences["hide"][0].count("the ") == 1


# ------------------------------------------------------------------------------------------------- pictures


def test_things_agree_with_the_picture():
    checked = 0
    for world in MANY[:40]:
        draw = worlds.Renderer(world, 192)
        for time in range(1, world.duration, 7):
            things, frame = world.things(time), draw(time)
            for thing in things:
                alone = all(t is thing or math.dist((t.x, t.y), (thing.x, thing.y)) > 0.4 for t in things)
                if thing.event is not None or thing.kind == "ring" or thing.visible < 1 or not alone:
                    continue
                pose = world.pose(thing.object, time)
                if pose.layer != 1 or 0 < pose.mix < 1:
                    continue
                x, y = round(thing.x * 192), round(thing.y * 192)
                light = 1 - world.backdrop.lighting[0] * np.array([0, 1])  # between full and dimmest light
                pixel = frame[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
                wanted = np.array(worlds.RGB[thing.colour])
                assert (pixel > wanted * light[1] - 12).all() and (pixel < wanted * light[0] + 12).all(), thing
                checked += 1
    assert checked > 100


def test_a_colour_change_counts_from_its_end_frame():
    world, event = next((w, e) for w in MANY for e in w.events if e.verb == "colour")
    colour = lambda time: next(t.colour for t in world.things(time) if t.object == event.subject)
    assert (colour(event.end_frame - 1), colour(event.end_frame)) == (event.before, event.after)


def test_an_object_that_hides_is_hidden_for_a_while_and_back_at_the_end():
    for world, event in [(w, e) for w in MANY for e in w.events if e.verb == "hide"][:20]:
        middle = [t for t in world.things((event.begin + event.finish) / 2) if t.object == event.subject]
        assert not middle or middle[0].visible < 0.2
        pose = world.pose(event.subject, event.end_frame)
        assert (pose.x, pose.y) == world.objects[event.subject].home and pose.layer == 1


def test_consecutive_frames_of_every_motion_differ():
    seen = collections.Counter()
    for world in MANY[:60]:
        draw = worlds.Renderer(world, 96)
        for event in world.events:
            if seen[event.verb] < 6:
                seen[event.verb] += 1
                before, during = (draw(t).astype(int) for t in (event.start_frame - 1, event.start_frame))
                changed = (np.abs(before - during).max(-1) > 40).sum()
                assert changed >= 12, (event.sentence, changed)
    assert set(seen) == set(worlds.VERBS)


# ------------------------------------------------------------------------------------------------- dialogues


def test_dialogues_are_in_order_and_one_reply_falls_into_a_frame():
    for task in worlds.TASKS | worlds.LESSONS:
        made = dialogues_of(task)
        assert len(made) > 100, task
        for world, dialogue in made:
            states(dialogue)
            assert dialogue.task == task and dialogue.queries
            assert [q.time for q in dialogue.queries] == sorted(q.time for q in dialogue.queries)
            frames = [given_frame(r) for r in dialogue.responses]
            assert frames == sorted(frames)
            assert 1 <= dialogue.queries[0].time and frames[-1] < world.duration
            assert all(r.start is None or r.start >= dialogue.queries[0].time for r in dialogue.responses)


def test_narration_tells_every_event_that_ends_after_the_query():
    for world, dialogue in dialogues_of("narration"):
        frame = dialogue.queries[0].time - 1
        told = {(e.end_frame + 1, e.sentence) for e in world.events if e.end_frame > frame}
        assert {(r.time, r.text) for r in dialogue.responses} == told


def test_grounding_queries_match_exactly_one_event():
    asked = {"forward_grounding": "does", "backward_grounding": "do"}
    for task, form in asked.items():
        for world, dialogue in dialogues_of(task):
            # Replies come in the order of the queries: forward ones are sequential, backward ones immediate.
            for query, response in zip(dialogue.queries, dialogue.responses, strict=True):
                frame = query.time - 1
                phrases = lambda e: (f"the {e.name} {e.does}", f"the {e.name} {e.do}")
                matching = [e for e in world.events if query.text.rstrip(".?").endswith(phrases(e))]
                if form == "does":
                    matching = [e for e in matching if e.end_frame > frame]
                    assert all(e.start_frame > frame for e in matching)
                    assert (response.start, response.end) == (matching[0].start, matching[0].end)
                else:
                    matching = [e for e in matching if e.start_frame <= frame]
                    assert response.time == query.time and matching[0].end_frame < frame
                assert len(matching) == 1
                assert response.text == f"From {matching[0].start}s to {matching[0].end}s."


def test_forward_queries_wait_one_after_another():
    for _, dialogue in dialogues_of("forward_grounding"):
        for response, query in zip(dialogue.responses, dialogue.queries[1:], strict=False):
            assert query.time - 1 > given_frame(response)


def test_questions_are_answered_at_once_and_updated_only_when_the_answer_changes():
    updates = 0
    for world, dialogue in dialogues_of("tsqa"):
        ends = {e.end_frame for e in world.events}
        asked = {q.time for q in dialogue.queries}
        answered = [r.time for r in dialogue.responses]
        assert asked <= set(answered)
        for time in set(answered) - asked:
            assert time - 1 in ends
            updates += 1
    assert updates > 100


def test_counts_and_colours_are_those_of_the_moment():
    checked = collections.Counter()
    for world, dialogue in dialogues_of("tsqa") + dialogues_of("quiz"):
        for query in dialogue.queries:
            answer = next(r.text for r in dialogue.responses if r.time == query.time)
            frame = query.time - 1
            if "jumps" in query.text:
                over = [e for e in world.events if e.verb == "jump" and e.end_frame <= frame]
                assert answer == f"{len(over)}."
                checked["count"] += 1
            elif "colour" in query.text:
                seen = [t for t in world.things(frame) if f" {t.kind}" in query.text]  # none while it is hidden
                assert len(seen) == 1 or (dialogue.task == "quiz" and not seen)
                assert [answer] * len(seen) == [f"{t.colour.capitalize()}." for t in seen]
                checked["colour"] += len(seen)
    assert min(checked["count"], checked["colour"]) > 20


def test_a_quiz_asks_of_all_sorts_and_often():
    sorts, queries, seconds = collections.Counter(), 0, 0
    for world, dialogue in dialogues_of("quiz"):
        queries, seconds = queries + len(dialogue.queries), seconds + world.duration
        for query in dialogue.queries:
            sorts.update(word for word in ("colour", "jumps", "objects", "ago", "did", "now") if word in query.text)
    assert queries / seconds > 0.2
    assert len(sorts) == 6 and min(sorts.values()) > 50, sorts


def test_a_drill_asks_in_most_frames_and_answers_each_question_once():
    made = dialogues_of("drill")
    assert sum(len(d.queries) for _, d in made) / sum(world.duration for world, _ in made) > 0.6
    for _, dialogue in made:
        assert [q.time for q in dialogue.queries] == [r.time for r in dialogue.responses]


def test_lessons_are_for_training_alone():
    assert not worlds.LESSONS.keys() & (worlds.TASKS.keys() | worlds.DEFAULT_WEIGHTS.keys())


def test_states_are_near_twelve_three_two():
    counts = collections.Counter()
    for index in range(700):
        dialogue = worlds.sample_dialogue(worlds.make_world(12, index), worlds.generator(12, index, 5))
        counts.update(states(dialogue))
    total = sum(counts.values())
    for state, share in (("silence", 12 / 17), ("standby", 3 / 17), ("response", 2 / 17)):
        assert abs(counts[state] / total / share - 1) < 0.15, counts


def test_an_unknown_task_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="narration"):
        worlds.make_dialogue(MANY[0], "narrate", worlds.generator(0))


# ------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    config = worlds.WorldConfig(min_seconds=20, max_seconds=22)
    summary = worlds.write_worlds(out, 2, seed=4, config=config)
    return out, config, summary


def test_a_written_video_decodes_to_the_frames(written):
    out, config, _ = written
    world = worlds.make_world(4, 1, config)
    draw = worlds.Renderer(world, 96)
    with av.open(str(out / "videos/000001.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
        frames = list(container.decode(stream))
        assert len(frames) == world.duration * 8
        for frame in frames[::40]:
            error = np.abs(frame.to_ndarray(format="rgb24").astype(int) - draw(frame.time))
            assert error.mean() < 4


def test_written_dialogues_are_in_the_raw_schema(written):
    out, config, summary = written
    read = list(dialogues_io.read_raw(out / "dialogues.jsonl"))
    assert collections.Counter(d.task for d in read) == summary["dialogues"]
    assert json.loads((out / "world.json").read_text()) == summary
    for dialogue in read:
        assert (out / dialogue.video).exists()
    worlds_of = {f"videos/{index:06d}.mp4": worlds.make_world(4, index, config) for index in range(2)}
    assert all(d.duration == worlds_of[d.video].duration for d in read)


def test_a_rerun_keeps_finished_videos_and_makes_the_missing(written):
    out, config, summary = written
    kept, lost = out / "videos/000000.mp4", out / "videos/000001.mp4"
    before, content = kept.stat().st_mtime_ns, lost.read_bytes()
    lost.rename(lost.with_name(lost.name + ".partial"))
    assert worlds.write_worlds(out, 2, seed=4, config=config) == summary
    assert kept.stat().st_mtime_ns == before
    assert lost.read_bytes() == content
    assert not list(out.rglob("*.partial"))


def test_a_folder_of_another_world_is_an_error(written):
    out, config, _ = written
    with pytest.raises(worlds.WorldError, match="seed=4 .asked for 5."):
        worlds.write_worlds(out, 2, seed=5, config=config)


def test_the_command_writes_in_several_processes(tmp_path):
    flags = [f"--out={tmp_path}", "--num_videos=2", "--min_seconds=10", "--max_seconds=10", "--size=32", "--workers=2"]
    done = subprocess.run([sys.executable, "-m", "jstream.data.world", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "videos").glob("*.mp4"))) == 2


@pytest.mark.parametrize("flags", [["--size=33"], ["--num_videos=0"], ["--min_seconds=90", "--max_seconds=20"]])
def test_the_command_says_what_is_wrong_in_one_line(tmp_path, flags):
    flags = [f"--out={tmp_path}", "--num_videos=1", *flags]
    done = subprocess.run([sys.executable, "-m", "jstream.data.world", *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_the_command_says_when_a_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    flags = [f"--out={tmp_path / 'file' / 'world'}", "--num_videos=1"]
    done = subprocess.run([sys.executable, "-m", "jstream.data.world", *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
