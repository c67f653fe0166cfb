"""How fast streams are: many of them in one engine beside the same one after another, and one over hours.

Videos are worlds, drawn beforehand. With no config the bundled model watches them; a config gives a model of its real
size with random weights, which speaks as it happens to.
"""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jstream.benchmarks.memory import resident
from jstream.benchmarks.report import Figure
from jstream.benchmarks.synthetic import bundled_protocol
from jstream.config import TrainConfig
from jstream.data import world as worlds
from jstream.data.video import Frame
from jstream.model import Model
from jstream.models.video_lm import init_params, param_dtype
from jstream.streaming.engine import Engine
from jstream.streaming.event import Event
from jstream.streaming.memory import OFTEN_SAID, capacity_for
from jstream.streaming.session import Session
from jstream.weights.checkpoint import load_model

QUESTION = "Narrate what happens."
MAX_NEW_TOKENS = 32
ROUNDS = 3  # of everything that is compared, in turns
SEED = 5  # of the worlds
SECONDS = 60  # of a world


def model_of(config: TrainConfig | None) -> Model:
    """The bundled model, or one of a config's size with random weights, in bfloat16 but on a CPU."""
    if config is None:
        return load_model()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16

    def make(key: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(param_dtype(x, dtype)), init_params(config.model, key))

    return Model(config.model, jax.jit(make)(jax.random.key(0)), bundled_protocol(config))


def frames_of(model: Model, index: int) -> Iterator[Frame]:
    """A world at one frame a second, and another behind it, without end."""
    size, start = max(model.config.vision.frame_size), 0
    while True:
        world = worlds.make_world(SEED, index, worlds.WorldConfig(SECONDS, SECONDS))
        draw = worlds.Renderer(world, size)
        for second in range(world.duration):
            yield Frame(float(start + second), draw(float(second)))
        start, index = start + world.duration, index + 1000


# ------------------------------------------------------------------------------------------- many streams in one engine


def measure_engine(config: TrainConfig | None, streams: int, frames: int, memory: str) -> list[Figure]:
    """Times streams in an engine and one after another in a session, in turns, and compares what they said.

    Args:
        streams: how many.
        frames: of each.
        memory: policy of all.
    """
    model = model_of(config)
    capacity = capacity_for(model.protocol, frames, [QUESTION], OFTEN_SAID) if memory == "append" else None
    settings: Any = dict(memory=memory, capacity=capacity, max_new_tokens=MAX_NEW_TOKENS)
    session, engine = Session(model, **settings), Engine(model, streams, **settings)
    videos = [[frame for _, frame in zip(range(frames), frames_of(model, index))] for index in range(streams)]
    alone, together, seconds = [], [], {"sessions": [], "engine": []}
    for _ in tqdm(range(ROUNDS), desc="rounds", delay=2):
        began = time.perf_counter()
        alone = [_watch_alone(session, video) for video in videos]
        seconds["sessions"].append(time.perf_counter() - began)
        began = time.perf_counter()
        together = _watch_together(engine, videos)
        seconds["engine"].append(time.perf_counter() - began)
    pairs = [pair for one, other in zip(alone, together) for pair in zip(one, other, strict=True)]
    same = sum((a.state, a.text) == (b.state, b.text) for a, b in pairs)
    apart = max(abs(a.probs[state] - b.probs[state]) for a, b in pairs for state in a.probs)
    speed = {name: streams * frames / statistics.median(times) for name, times in seconds.items()}
    latencies = [event.latency for events in together for event in events]
    return [
        Figure("memory_policy", memory),
        Figure("streams", streams),
        Figure("frames_a_stream", frames),
        Figure("replies", sum(event.text is not None for events in together for event in events)),
        Figure("sessions_frames_per_second", speed["sessions"], "{:,.1f}"),
        Figure("engine_frames_per_second", speed["engine"], "{:,.1f}"),
        Figure("ratio", speed["engine"] / speed["sessions"], "{:.2f}"),
        Figure("engine_event_ms_median", 1e3 * statistics.median(latencies), "{:.1f}"),
        Figure("engine_event_ms_p95", 1e3 * float(np.percentile(latencies, 95)), "{:.1f}"),
        Figure("events_equal", same / len(pairs), "{:.2%}"),
        Figure("max_probability_difference", apart, "{:.1e}"),
    ]


def _watch_alone(session: Session, video: list[Frame]) -> list[Event]:
    session.reset()
    session.ask(QUESTION)
    return [session.see(frame) for frame in video]


def _watch_together(engine: Engine, videos: list[list[Frame]]) -> list[list[Event]]:
    """All streams get their next frame at once, as from cameras; a reply of one may run on while others see more."""
    places = [engine.open() for _ in videos]
    events: dict[int, list[Event]] = {place: [] for place in places}
    for place in places:
        engine.ask(place, QUESTION)
    for frames in zip(*videos):
        for place, frame in zip(places, frames):
            engine.see(place, frame)
        while any(engine.queued(place) > 1 for place in places):
            _take(engine, events)
    while engine.busy:
        _take(engine, events)
    for place in places:
        engine.close(place)
    return [events[place] for place in places]


def _take(engine: Engine, events: dict[int, list[Event]]) -> None:
    for place, event in engine.step():
        if isinstance(event, Exception):
            raise event
        events[place].append(event)


# ------------------------------------------------------------------------------------------------- one stream, for long


def measure_longrun(config: TrainConfig | None, frames: int, memory: str) -> list[Figure]:
    """Watches one stream for long, and tells whether anything grows.

    Args:
        frames: how many; the first and the last tenth are compared.
        memory: policy.
    """
    model, compiled = model_of(config), []
    session = Session(model, memory, max_new_tokens=MAX_NEW_TOKENS)
    session.ask(QUESTION)
    listening = True
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if listening and "backend_compile" in event else None
    )
    part = max(frames // 10, 1)
    costs, held, spoken = [], [], 0
    for number, frame in zip(tqdm(range(frames), desc="frames", delay=2), frames_of(model, 0)):
        event = session.see(frame)
        spoken += event.text is not None
        costs.append(event.latency if event.text is None else None)
        if (number + 1) % part == 0:
            held.append(resident())
    listening = False
    silent = lambda stretch: [cost for cost in stretch if cost is not None] or [float("nan")]
    first, last = silent(costs[part : 2 * part]), silent(costs[-part:])  # the first tenth warms up
    return [
        Figure("memory_policy", memory),
        Figure("frames", frames),
        Figure("replies", spoken),
        Figure("compiled_while_running", len(compiled)),
        Figure("early_ms_median", 1e3 * statistics.median(first), "{:.2f}"),
        Figure("late_ms_median", 1e3 * statistics.median(last), "{:.2f}"),
        Figure("late_beside_early", statistics.median(last) / statistics.median(first), "{:.3f}"),
        Figure("ms_p99", 1e3 * float(np.percentile(silent(costs[part:]), 99)), "{:.2f}"),
        Figure("early_resident_mib", held[0] / 2**20, "{:,.0f}"),
        Figure("late_resident_mib", held[-1] / 2**20, "{:,.0f}"),
        Figure("resident_beside_early", held[-1] / held[0] if held[0] else None, "{:.3f}"),
        Figure("device_arrays", len(jax.live_arrays())),
    ]
