"""Watches videos, cameras or live streams with a model, and prints what it says, as it says it.

    python -m jstream.stream                                # the bundled clip
    python -m jstream.stream --query="5:How many objects are there now?"
    python -m jstream.stream --video=FILE --fps=2 --query="Tell me when it rains."
    python -m jstream.stream --video=rtsp://USER:PASSWORD@HOST/PATH
    python -m jstream.stream --video=FILE --config=configs/joyai.py

A camera or live stream (`--video=rtsp://…`, `--video=0`) is watched until Ctrl-C, SIGTERM, `--duration` or its end.
Several `--video` are watched together, by one engine; each is asked every query and gets a folder of its own in the
output folder. With no flags the bundled model watches the bundled clip; `--config=configs/streamo.py` and its like say
where published weights lie and what language they speak. `events.jsonl`, `captions.vtt` and `timeline.png` are written
to one folder.
"""

import contextlib
import dataclasses
import json
import pathlib
import re
import signal
import statistics
import sys
import time
from typing import Any

import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from jstream import command
from jstream.config import ConfigError
from jstream.data.live import RECONNECT, LiveVideo
from jstream.data.video import Frame, Video, VideoError, open_video, paced
from jstream.model import Model
from jstream.models.cache import CacheFullError
from jstream.sharding import make_mesh
from jstream.streaming.engine import Engine
from jstream.streaming.event import Asked, Event
from jstream.streaming.feeds import watch
from jstream.streaming.memory import EXPECTED, OFTEN_SAID, capacity_for, parse_memory
from jstream.streaming.recording import Recording
from jstream.streaming.stream import MAX_QUERY
from jstream.weights.checkpoint import BUNDLED
from jstream.weights.published import load_of_config

_VIDEO = flags.DEFINE_multi_string(
    "video", [], "File, URL (https, rtsp, …) or camera (0, /dev/video0); the bundled clip by default."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Model folder or hub id; the config's or the bundled model by default."
)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share the model.", 1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the params; bfloat16 by default, float32 on a CPU."
)
_QUERY = flags.DEFINE_multi_string("query", [], 'What to ask, and at which second: "12:What is it?".')
_FPS = flags.DEFINE_float("fps", 1.0, "Frames a second the model sees.", lower_bound=0.01, upper_bound=60.0)
_OUT = flags.DEFINE_string("out", "runs/stream", "Folder for events.jsonl, captions.vtt, timeline.png.")
_REALTIME = flags.DEFINE_bool("realtime", False, "Keep to the clock, as a camera does; drop late frames.")
_DURATION = flags.DEFINE_float("duration", None, "Seconds to watch; to the end by default.", lower_bound=0.1)
_RECONNECT = flags.DEFINE_float(
    "reconnect", RECONNECT, "Seconds for which a lost live stream is tried again.", lower_bound=0.0
)
_THRESHOLD = flags.DEFINE_float("threshold", None, "Speak when p(response) reaches this.", 0.0, 1.0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of replies; 0 is greedy.", lower_bound=0.0)
_MEMORY = flags.DEFINE_string(
    "memory", None, f"What is kept of a stream: {EXPECTED}; append by default, sinks for what has no end."
)
_MAX_TURNS = flags.DEFINE_integer("max_turns", None, "Short for --memory=reprefill:N, Streamo's `max_rounds`.", 1)
_CAPACITY = flags.DEFINE_integer("capacity", None, "Tokens the cache holds; enough by default.", 256)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "A reply is cut there.", 1, 4096)
_INT8_CACHE = flags.DEFINE_bool("int8_cache", False, "Keep keys and values in int8, in half the bytes.")

_DEFAULT_QUERY = "0:Narrate what happens."
_UNKNOWN_LENGTH = 600  # turns to hold for a stream that does not say how long it is
MAX_CAPACITY = 1 << 16  # tokens; what a file says of its own length is not to be trusted with all the memory


def parse_query(text: str) -> Asked:
    """Reads `SECONDS:QUESTION`; without seconds the question is asked at the start.

    Raises:
        ConfigError: for an empty question, or one that is too long.
    """
    timed = re.fullmatch(r"\s*([+-]?[\d.]+)\s*:(.*)", text, flags=re.DOTALL)
    seconds, question = (timed[1], timed[2].strip()) if timed else ("0", text.strip())
    valid = re.fullmatch(r"\d+(\.\d+)?|\.\d+", seconds)
    if not valid or not 1 <= len(question) <= MAX_QUERY:
        raise ConfigError(
            f'--query={text[:60]!r}: expected "SECONDS:QUESTION" with SECONDS ≥ 0 and a question of at most '
            f'{MAX_QUERY} characters, as in "12:What colour is the circle now?"'
        )
    return Asked(question, float(seconds))


def chosen_memory(memory: str | None, max_turns: int | None, endless: bool = False) -> str:
    """The policy that the two flags name.

    Args:
        endless: whether a source has no end, so that no cache could keep it all.

    Raises:
        ConfigError: for both flags at once.
    """
    if memory is not None and max_turns is not None:
        raise ConfigError(f"expected --memory or --max_turns, found --memory={memory} and --max_turns={max_turns}")
    if max_turns is not None:
        return f"reprefill:{max_turns}"
    return memory or ("sinks" if endless else "append")


def automatic_capacity(model: Model, num_frames: int | None, queries: list[Asked]) -> int:
    """Tokens the cache is given to keep a whole video, within MAX_CAPACITY."""
    turns = num_frames or _UNKNOWN_LENGTH
    tokens = capacity_for(model.protocol, turns, [query.text for query in queries], OFTEN_SAID)
    return min(-(-tokens // 256) * 256, MAX_CAPACITY)


def say(line: str) -> None:
    """Prints a line above the progress bar, at once also where the output is a pipe."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


@dataclasses.dataclass
class Watched:
    """One video of the command.

    Attributes:
        video: open.
        frames: of it, perhaps paced.
        recording: open, with what has come of it.
        waiting: what is still to be asked.
        tag: opens its lines, where there are several videos.
        costs: seconds a frame, its decoding included where frames are not dropped.
        failure: why it broke off.
    """

    video: Video | LiveVideo
    frames: Any
    recording: Recording
    waiting: list[Asked]
    tag: str
    costs: list[float] = dataclasses.field(default_factory=list)
    failure: Exception | None = None
    _state: str = ""
    _since: float = dataclasses.field(default_factory=time.perf_counter)

    def due(self, frame: Frame) -> list[str]:
        """What is to be asked with a frame."""
        texts = []
        while self.waiting and self.waiting[0].time <= frame.time:
            query = self.waiting.pop(0)
            texts.append(query.text)
            self.recording.queries.append(query._replace(time=frame.time))
            say(f"{self.tag}{frame.time:7.1f}s  {'query':8s}  {query.text}")
        return texts

    def note(self, event: Event) -> None:
        """Writes an event down, and tells what is new in it."""
        self.recording.add(event)
        if event.text or event.state != self._state:
            say(f"{self.tag}{event}")
        self._state, now = event.state, time.perf_counter()
        self.costs.append(now - self._since if isinstance(self.frames, Video) else event.latency)
        self._since = now

    def tell(self) -> None:
        """Prints what came of it."""
        replies = sum(event.text is not None for event in self.recording.events)
        median = f"; median {1000 * statistics.median(self.costs):.1f} ms a frame" if self.costs else ""
        print(f"{self.tag}{len(self.costs)} frames, {replies} replies{median}", flush=True)
        if self.waiting:
            left = ", ".join(f"{query.time:g}:{query.text}" for query in self.waiting)
            print(f"{self.tag}not asked, the video ended before: {left}")
        if self.video.lost or self.video.warnings:
            print(f"{self.tag}{self.video.summary}")
        print(f"{self.tag}written to {self.recording.out_dir}: {', '.join(Recording.NAMES)}")
        if not isinstance(self.frames, Video):
            again = f", reconnects: {self.frames.reconnects}" if isinstance(self.frames, LiveVideo) else ""
            print(f"{self.tag}late frames dropped: {self.frames.dropped}{again}")


def main() -> None:
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever runs this as a service stops it so
    sources: list[Any] = _VIDEO.value or [BUNDLED / "clip.mp4"]
    texts = _QUERY.value
    if not texts:
        bundled = json.loads((BUNDLED / "clip.json").read_text())["queries"]
        texts = [_DEFAULT_QUERY] if _VIDEO.value else bundled
    queries = sorted(map(parse_query, texts), key=lambda query: query.time)
    dtype = jnp.dtype(_DTYPE.value) if _DTYPE.value else None
    mesh = make_mesh(tensor=_TENSOR.value) if _TENSOR.value > 1 else None
    parse_memory(chosen_memory(_MEMORY.value, _MAX_TURNS.value))  # before anything is opened
    model = load_of_config(command.given_config(), _CHECKPOINT.value, dtype, mesh)

    # ------------------------------------------------------------------------------------------ videos and engine
    with contextlib.ExitStack() as stack:
        opened = lambda source: open_video(source, _FPS.value, until=_DURATION.value, reconnect=_RECONNECT.value)
        videos = [stack.enter_context(opened(source)) for source in sources]
        model = model.for_frames(videos[0].height, videos[0].width)
        endless = any(isinstance(video, LiveVideo) and video.num_frames is None for video in videos)
        memory = chosen_memory(_MEMORY.value, _MAX_TURNS.value, endless)
        capacity = _CAPACITY.value  # a window finds its own
        if capacity is None and parse_memory(memory).turns is None:
            capacity = max(automatic_capacity(model, video.num_frames, queries) for video in videos)
        engine = Engine(
            model,
            len(videos),
            memory,
            capacity=capacity,
            fps=_FPS.value,
            threshold=_THRESHOLD.value,
            temperature=_TEMPERATURE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            int8_cache=_INT8_CACHE.value,
        )
        print(
            f"ready after {time.perf_counter() - began:.1f} s, of which compiling {engine.compile_seconds:.1f} s; "
            f"{model.config.vision.tokens_per_frame} tokens a frame",
            flush=True,
        )

        # ------------------------------------------------------------------------------------------------ watching
        with contextlib.ExitStack() as recordings:
            watched: dict[int, Watched] = {}
            for number, video in enumerate(videos):
                name = video.name if _VIDEO.value else "bundled clip"
                several = len(videos) > 1
                out = pathlib.Path(_OUT.value, f"{number + 1}-{pathlib.PurePath(name).stem}" if several else "")
                frames = paced(video) if _REALTIME.value and not isinstance(video, LiveVideo) else video
                tag = f"[{number + 1}] " if several else ""
                if isinstance(video, LiveVideo):
                    video.on_gap = lambda gap, tag=tag: say(f"{tag}{gap}")
                recording = recordings.enter_context(Recording(out, title=name))
                watched[engine.open(seed=number)] = Watched(video, frames, recording, list(queries), tag)
            lengths = [video.num_frames for video in videos]
            total = None if None in lengths else sum(filter(None, lengths))
            bar = recordings.enter_context(tqdm(total=total, unit="frame", dynamic_ncols=True))
            asked = lambda place, frame: watched[place].due(frame)
            stream = watch(engine, {place: one.frames for place, one in watched.items()}, asked)
            recordings.callback(stream.close)
            try:
                for place, event in stream:
                    if isinstance(event, Event):
                        watched[place].note(event)
                        bar.set_postfix_str(f"{event.state}, {1000 * event.latency:.0f} ms")
                        bar.update()
                    elif event.error is not None:
                        if not isinstance(event.error, (CacheFullError, VideoError)):
                            raise event.error
                        watched[place].failure = event.error  # what was seen is kept
            except KeyboardInterrupt:  # a live stream ends when one stops it; what was seen is kept
                say("stopped")

    for one in watched.values():
        one.tell()
    for one in watched.values():
        if one.failure is not None:
            raise one.failure


if __name__ == "__main__":
    command.run(main)
