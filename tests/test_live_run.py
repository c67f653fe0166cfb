"""The streaming metrics over a model: the numbers of a plain reading that keeps every logit."""

import collections
import dataclasses
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
MODELS = {"live": (LIVE, ()), "live, multimodal": (LIVE, (1, 1, 2)), "streamo": (TINY_TEMPLATE, ())}


def model_of(template, mrope_section, seed=0, temporal=1) -> Model:
    """A random model that is often silent."""
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


def all_probs(model, tokens, clips) -> np.ndarray:
    """[T, V]: p of every token behind every token, without padding or blocks."""
    tokens = np.asarray(tokens, np.int32)
    is_frame = tokens == model.protocol.frame_id
    rope, _ = rope_positions(is_frame, model.config.vision.token_grid, bool(model.config.decoder.mrope_section))
    run = lambda *args, method: VideoLM(model.config).apply({"params": model.params}, *args, method=method)
    frame_tokens = run(clips, method="embed_frames").reshape(1, -1, model.config.decoder.width)
    embeds = run(tokens[None], is_frame[None], frame_tokens, method="embed_tokens")
    hidden, _ = run(embeds, jnp.arange(len(tokens))[None], jnp.asarray(rope)[:, None], method="hidden")
    return np.asarray(jax.nn.softmax(run(hidden, method="logits")[0]), np.float64)


def speaks(protocol, probs) -> bool:
    """LIVE: the comma is not the most probable token. Streamo: of the states, the response is."""
    if protocol.name == "live":
        return int(probs.argmax()) != protocol.silence_id
    return int(probs[list(protocol.state_ids)].argmax()) == RESPONSE


def by_hand(model, turns, images, seen: collections.Counter) -> list[float | None]:
    protocol = model.protocol
    r = protocol.render(turns)
    first = jnp.arange(len(images))[None] == 0
    clips = stack_frames(jnp.asarray(images)[None], first, model.config.vision.num_images)[0]
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
                if speaks(protocol, all_probs(model, tokens, clips[np.asarray(shown)])[-1]):
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
    monkeypatch.setattr(live_run, "SHORTEST", 256)
    seen = collections.Counter()
    for seed in range(6):
        model = model_of(*MODELS[name], seed=seed // 3, temporal=2 if "multimodal" in name else 1)
        turns = dialogue(seed)
        images = images_of(len(turns), seed)
        found = live_run.measure(model, turns, images)
        expected = by_hand(model, turns, images, seen)
        assert found.frames_off == expected[1] and found.fluency == pytest.approx(expected[2])
        np.testing.assert_allclose(found.perplexity, expected[0], rtol=2e-3)
        assert found.correctness == pytest.approx(expected[3])
    print(name, seen)
    assert min(seen["early"], seen["in time"], seen["run on"]) > 0, seen
