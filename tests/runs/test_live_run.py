"""The streaming metrics over a model: the numbers of a plain reading that keeps every logit."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_session import TINY_TEMPLATE, make_model

from jstream.config import ConfigError
from jstream.data import world
from jstream.data.dialogue import DialogueError, dialogue_to_raw
from jstream.data.frames import letterbox
from jstream.data.video import open_video
from jstream.data.world.write import write_video
from jstream.evals import live_run
from jstream.evals.live_metrics import Measured
from jstream.model import Model
from jstream.models.rope import rope_positions
from jstream.models.video_lm import VideoLM, stack_frames
from jstream.protocols.live import PUBLISHED, turns_of_chat
from jstream.protocols.protocol import NOT_LEARNED, RESPONSE, STATE, Turn
from jstream.protocols.streamo import turns_of

LIVE = dataclasses.replace(PUBLISHED, system="Watch.")
MODELS = {"live": (LIVE, (), 1), "streamo": (TINY_TEMPLATE, (1, 1, 2), 2)}  # language, positions, images of a patch


def model_of(name, seed=0) -> Model:
    """A random model that is often silent."""
    template, mrope_section, temporal = MODELS[name]
    model = make_model(mrope_section, temporal, template=template, seed=seed)
    embedding = np.array(model.params["decoder"]["embed_tokens"]["embedding"])
    embedding[model.protocol.decision_ids[0]] *= 8 if template is LIVE else 1
    decoder = {**model.params["decoder"], "embed_tokens": {"embedding": jnp.asarray(embedding)}}
    return dataclasses.replace(model, params={**model.params, "decoder": decoder})


def dialogue(seed: int) -> list[Turn]:
    """Frames, of which some are not learned, questions with and without an answer, replies learned or not."""
    rng, turns = np.random.default_rng(seed), []
    for _ in range(5):
        count, unlearned = rng.integers(1, 6), rng.integers(0, 2) * rng.integers(0, 4)
        learn = [None if i >= unlearned else False for i in range(count)]
        turns += [Turn(0, 0, learn_state=learns) for learns in learn]
        query = rng.choice([None, None, "What is it?"])
        turns[-1] = dataclasses.replace(
            turns[-1], query=query, state=RESPONSE, reply=str(rng.choice(["The circle.", "It jumps now."])),
            learn_reply=bool(rng.random() < 0.8), learn_state=False if not rng.integers(4) else turns[-1].learn_state,
        )  # fmt: skip
    turns += [Turn(0, 0, query="Narrate."), Turn(0, 0)]
    return [dataclasses.replace(turn, start=i, end=i + 1) for i, turn in enumerate(turns)]


def images_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), np.uint8)


# ---------------------------------------------------------------------------------------------------- a plain reading


ROOM = 640, 48  # tokens and frames; what is behind a text changes nothing before it


@functools.partial(jax.jit, static_argnums=0)
def read_plainly(config, params, tokens, is_frame, rope, clips):
    run = lambda *args, method: VideoLM(config).apply({"params": params}, *args, method=method)
    frame_tokens = run(clips, method="embed_frames").reshape(1, -1, config.decoder.width)
    embeds = run(tokens[None], is_frame[None], frame_tokens, method="embed_tokens")
    hidden, _ = run(embeds, jnp.arange(len(tokens))[None], rope[:, None], method="hidden")
    return jax.nn.softmax(run(hidden, method="logits")[0])


def all_probs(model, tokens, clips) -> np.ndarray:
    """[T, V]: p of every token behind every token."""
    padded = np.full(ROOM[0], model.protocol.end_id, np.int32)
    padded[: len(tokens)] = tokens
    is_frame = padded == model.protocol.frame_id
    rope, _ = rope_positions(is_frame, model.config.vision.token_grid, bool(model.config.decoder.mrope_section))
    whole = np.zeros((ROOM[1], *clips.shape[1:]), np.uint8)
    whole[: len(clips)] = clips
    probs = read_plainly(model.config, model.params, padded, is_frame, rope, whole)
    return np.asarray(probs, np.float64)[: len(tokens)]


def speaks(protocol, probs) -> bool:
    """LIVE: the comma is not the most probable token. Streamo: of the states, the response is."""
    if protocol.name == "live":
        return int(probs.argmax()) != protocol.silence_id
    return int(probs[list(protocol.state_ids)].argmax()) == RESPONSE


def by_hand(model, turns, images, seen: collections.Counter) -> list[float | None]:
    protocol = model.protocol
    r = protocol.render(turns)
    first = jnp.arange(len(images))[None] == 0
    clips = np.asarray(stack_frames(jnp.asarray(images)[None], first, model.config.vision.num_images)[0])
    probs = all_probs(model, r.tokens, clips[: len(turns)])
    found = [[], [], [], []]
    begins = 0
    replied = [i for i, turn in enumerate(turns) if turn.reply is not None]
    for number, last in enumerate(replied):
        mine = range(begins, last + 1)
        begins = last + 1
        decided = [i for i in mine if r.kinds[r.decisions[i]] == STATE]
        stop = len(r.tokens) if last + 1 == len(turns) else r.decisions[last + 1]
        words = [p for p in range(r.decisions[mine[0]], stop) if r.kinds[p] not in (NOT_LEARNED, STATE)]
        right = 0
        if words:
            found[0].append(np.exp(np.mean([-np.log(probs[p, r.labels[p]]) for p in words])))
            while right < len(words) and probs[words[right]].argmax() == r.labels[words[right]]:
                right += 1
            found[3].append(right / len(words))
        if not decided:
            continue
        early = next((i for i in decided if speaks(protocol, probs[r.decisions[i]])), None)
        if early is not None:
            off = len(decided) - 1 - decided.index(early)
            seen["in time" if off == 0 else "early"] += 1
        else:
            off = 0
            following = range(begins, replied[number + 1] + 1) if number + 1 < len(replied) else range(0)
            further = following[: len(mine) - 1]
            tokens, shown = r.tokens[: r.decisions[decided[-1]] + 1].tolist(), list(range(decided[-1] + 1))
            for i in further:
                tokens += protocol.close_turn(0) + protocol.open_turn(dataclasses.replace(turns[i], query=None))
                shown.append(i)
                off -= 1
                if speaks(protocol, all_probs(model, tokens, clips[shown])[-1]):
                    break
            seen["run on" if further else "nothing further"] += 1
            seen["late"] += bool(further) and -off < len(further)
        found[1].append(abs(off))
        if words:
            good = len(decided) + right if off == 0 else len(decided) - max(off, 1)
            found[2].append(good / (len(decided) + len(words)))
    return [float(np.mean(column)) if column else None for column in found]


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_a_plain_reading(name, monkeypatch):
    monkeypatch.setattr(live_run, "FRAMES_AT_ONCE", 8)
    monkeypatch.setattr(live_run, "LOGITS_AT_ONCE", 1)  # blocks of 128 tokens
    monkeypatch.setattr(live_run, "SHORTEST", 512)
    seen = collections.Counter()
    for seed in range(6):
        model = model_of(name, seed // 3)
        turns = dialogue(seed)
        images = images_of(len(turns), seed)
        found = live_run.measure(model, turns, images)
        expected = by_hand(model, turns, images, seen)
        assert found.frames_off == expected[1] and found.fluency == pytest.approx(expected[2])
        np.testing.assert_allclose(found.perplexity, expected[0], rtol=2e-3)
        assert found.correctness == pytest.approx(expected[3])
    assert min(seen["early"], seen["in time"], seen["run on"]) > 0, seen


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """Over a video of the world: a dialogue, a chat at its own rate; and a dialogue over a video that is not there."""
    folder = tmp_path_factory.mktemp("dialogues")
    made = world.make_world(9, 0, world.WorldConfig(10, 12))
    write_video(made, folder / "0.mp4", 48)
    raw = lambda name: dialogue_to_raw(world.make_dialogue(made, "narration", world.generator(0), name))
    records = [raw("0.mp4"), {"video": "0.mp4", "conversation": CHAT, "fps": 4, "start": 1.5}, raw("none.mp4")]
    (folder / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "d.jsonl"


CHAT = [
    {"role": "stream", "num_frames": 2, "learn": False},
    {"role": "user", "content": "What is it?"},
    {"role": "stream", "num_frames": 6, "learn": True},
    {"role": "assistant", "content": "The circle.", "learn": True},
    {"role": "stream", "num_frames": 5, "learn": 4},
    {"role": "assistant", "content": "It jumps.", "learn": True},
    {"role": "stream", "num_frames": 3, "learn": True},
]


def frames_at(path, fps, first, count):
    with open_video(path, fps) as video:
        return np.stack([letterbox(frame.image, 24) for frame in list(video)[first : first + count]])


@pytest.mark.parametrize("name", MODELS)
def test_dialogues_of_a_file_are_laid_over_the_frames_of_their_videos(name, dialogues, tmp_path):
    model, seen = model_of(name), collections.Counter()
    report = live_run.evaluate(model, dialogues, tmp_path)
    said = world.make_dialogue(world.make_world(9, 0, world.WorldConfig(10, 12)), "narration", world.generator(0), "")
    first = frames_at(dialogues.parent / "0.mp4", 1, 0, 99)
    turns = turns_of(said, len(first))
    second = frames_at(dialogues.parent / "0.mp4", 4, 6, 16)
    of_chat = turns_of_chat(CHAT, fps=4)
    rows = [by_hand(model, turns, first, seen), by_hand(model, of_chat, second, seen)]
    ppl, off, fluency, correctness = zip(*rows)
    np.testing.assert_allclose(report.metrics["LM-PPL"], np.mean(ppl), rtol=2e-3)
    assert report.metrics["TimeDiff"] == pytest.approx(np.mean([off[0] / 1, off[1] / 4]), abs=1e-6)
    assert report.metrics["Fluency"] == pytest.approx(100 * np.mean(fluency), abs=1e-5)
    assert report.metrics["LM-Correctness"] == pytest.approx(100 * np.mean(correctness), abs=1e-5)
    assert report.cases["LM-PPL"][1] == 2
    assert len(report.notes) == 1 and "none.mp4" in report.notes[0]
    assert "1 or 4 frames a second" in report.rules["TimeDiff"]
    assert ("standby" in report.rules["silence"]) == (name == "streamo")


def test_only_so_many_dialogues_are_measured_as_asked_for(dialogues, tmp_path):
    report = live_run.evaluate(model_of("live"), dialogues, tmp_path, num_dialogues=1)
    assert report.cases["LM-PPL"][1] == 1 and report.notes == ()


def test_a_run_that_was_killed_goes_on_with_what_it_had(dialogues, tmp_path, monkeypatch):
    model, measure, calls = model_of("live"), live_run.measure, []
    whole = live_run.evaluate(model, dialogues, tmp_path / "whole")

    def killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(live_run, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        live_run.evaluate(model, dialogues, tmp_path / "killed")
    assert live_run.evaluate(model, dialogues, tmp_path / "killed") == whole
    assert len(calls) == 3  # two dialogues, the second of them again
    with pytest.raises(ConfigError, match="expected a run with weights .* take another --out"):
        live_run.evaluate(model_of("live", seed=1), dialogues, tmp_path / "killed")


def test_a_dialogue_without_a_reply_has_nothing_to_measure():
    assert live_run.measure(model_of("live"), [Turn(0, 1, "Narrate.")], images_of(1, 0)) == Measured(*[None] * 4)


def test_dialogues_none_of_which_can_be_read_are_an_error_of_one_line(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps([{"video": "none.mp4", "conversation": CHAT}]))
    with pytest.raises(
        DialogueError, match="expected dialogues over videos that can be read, found none.*none.mp4"
    ) as e:
        live_run.evaluate(model_of("live"), tmp_path / "d.json", tmp_path)
    assert "\n" not in str(e.value)
    with pytest.raises(ConfigError, match="num_dialogues: expected at least 1, found 0"):
        live_run.evaluate(model_of("live"), tmp_path / "d.json", tmp_path, num_dialogues=0)


def test_no_program_is_compiled_for_another_dialogue(monkeypatch):
    model = model_of("live")
    live_run.measure(model, dialogue(0), images_of(len(dialogue(0)), 0))
    before = live_run._read._cache_size(), live_run._embed._cache_size()
    turns = dialogue(3)[:-4]
    live_run.measure(model, turns, images_of(len(turns), 1))
    assert (live_run._read._cache_size(), live_run._embed._cache_size()) == before
