"""Watches a video: `python -m jstream.stream [--video=clip.mp4] [--query="12:What colour is the circle now?"] …`.

`--video=rtsp://…` and `--video=0` watch a camera, until Ctrl-C, SIGTERM, `--duration` or its end.

With no flags the bundled model watches the bundled clip; `--config=configs/streamo.py` and its like say where published
weights lie and what language they speak. Prints what happens as it happens, and writes `events.jsonl`, `captions.vtt`
and `timeline.png` to one folder.
"""

import json
import re
import signal
import statistics
import sys
import time

import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from jstream import command
from jstream.config import ConfigError
from jstream.data.live import RECONNECT, LiveVideo
from jstream.data.video import Video, VideoError, open_video, paced
from jstream.model import Model
from jstream.models.cache import CacheFullError
from jstream.sharding import make_mesh
from jstream.streaming.event import Asked
from jstream.streaming.memory import OFTEN_SAID, capacity_for, parse_memory
from jstream.streaming.recording import Recording
from jstream.streaming.session import MAX_QUERY, Session
from jstream.weights.checkpoint import BUNDLED
from jstream.weights.published import load_of_config

_VIDEO = flags.DEFINE_string(
    "video", "", "File, URL (http, https, rtsp, rtsps) or camera (0, /dev/video0); the bundled clip by default."
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "", "Model folder, ours or a published one, or hub id; the config's or the bundled model by default."
)
_TENSOR = flags.DEFINE_integer("tensor", 1, "Devices that share the model.", 1)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of the params; by default bfloat16, float32 on a CPU."
)
_QUERY = flags.DEFINE_multi_string("query", [], 'What to ask, with the second to ask it at: "12:What colour is it?".')
_FPS = flags.DEFINE_float("fps", 1.0, "Frames a second the model sees.", lower_bound=0.01, upper_bound=60.0)
_OUT = flags.DEFINE_string("out", "runs/stream", "Folder for events.jsonl, captions.vtt and timeline.png.")
_REALTIME = flags.DEFINE_bool("realtime", False, "Keep to the clock, as a camera does: late frames are dropped.")
_DURATION = flags.DEFINE_float("duration", None, "Seconds to watch; to the end by default.", lower_bound=0.1)
_RECONNECT = flags.DEFINE_float(
    "reconnect", RECONNECT, "Seconds for which a camera or live stream that was lost is tried again.", lower_bound=0.0
)
_THRESHOLD = flags.DEFINE_float("threshold", None, "Speak when p(response) reaches this.", 0.0, 1.0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of replies; 0 is greedy.", lower_bound=0.0)
_MEMORY = flags.DEFINE_string(
    "memory", None, "What of a long stream is kept: append (all, the default), reprefill[:TURNS] or last_frames[:N]."
)
_MAX_TURNS = flags.DEFINE_integer(
    "max_turns", None, "Short for --memory=reprefill:N, a window of N turns: `max_rounds` of Streamo's inference.", 1
)
_CAPACITY = flags.DEFINE_integer(
    "capacity", None, "Tokens the cache holds; by default enough for the video, or for the window of the memory.", 256
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "A reply is cut there.", 1, 4096)

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


def chosen_memory(memory: str | None, max_turns: int | None) -> str:
    """The policy that the two flags name.

    Raises:
        ConfigError: for both flags at once.
    """
    if memory is not None and max_turns is not None:
        raise ConfigError(f"expected --memory or --max_turns, found --memory={memory} and --max_turns={max_turns}")
    if max_turns is not None:
        return f"reprefill:{max_turns}"
    return "append" if memory is None else memory


def automatic_capacity(model: Model, video: Video | LiveVideo, queries: list[Asked]) -> int:
    """Tokens the cache is given to keep a whole video, within MAX_CAPACITY."""
    turns = video.num_frames or _UNKNOWN_LENGTH
    tokens = capacity_for(model.protocol, turns, [query.text for query in queries], OFTEN_SAID)
    return min(-(-tokens // 256) * 256, MAX_CAPACITY)


def say(line: str) -> None:
    """Prints a line above the progress bar, at once also where the output is a pipe."""
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def main() -> None:
    began = time.perf_counter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever runs this as a service stops it so
    bundled = not _VIDEO.value
    texts = _QUERY.value
    if not texts:
        texts = json.loads((BUNDLED / "clip.json").read_text())["queries"] if bundled else [_DEFAULT_QUERY]
    waiting = sorted(map(parse_query, texts), key=lambda query: query.time)
    dtype = jnp.dtype(_DTYPE.value) if _DTYPE.value else None
    mesh = make_mesh(tensor=_TENSOR.value) if _TENSOR.value > 1 else None
    memory = chosen_memory(_MEMORY.value, _MAX_TURNS.value)
    unbounded = parse_memory(memory).turns is None
    model = load_of_config(command.given_config(), _CHECKPOINT.value, dtype, mesh)

    source = BUNDLED / "clip.mp4" if bundled else _VIDEO.value
    with open_video(source, _FPS.value, until=_DURATION.value, reconnect=_RECONNECT.value) as video:
        model = model.for_frames(video.height, video.width)
        capacity = _CAPACITY.value  # a window finds its own
        if capacity is None and unbounded:
            capacity = automatic_capacity(model, video, waiting)
        session = Session(
            model,
            memory,
            capacity=capacity,
            fps=_FPS.value,
            threshold=_THRESHOLD.value,
            temperature=_TEMPERATURE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
        )
        print(
            f"ready after {time.perf_counter() - began:.1f} s, of which compiling {session.compile_seconds:.1f} s; "
            f"{model.config.vision.tokens_per_frame} tokens a frame",
            flush=True,
        )
        frames = paced(video) if _REALTIME.value and not isinstance(video, LiveVideo) else video
        late_are_dropped = not isinstance(frames, Video)
        name = "bundled clip" if bundled else video.name
        with (
            Recording(_OUT.value, title=name) as recording,
            tqdm(total=video.num_frames, unit="frame", dynamic_ncols=True) as bar,
        ):
            if isinstance(video, LiveVideo):
                video.on_gap = lambda gap: say(str(gap))
            costs, state, failure = [], "", None  # seconds a frame, its decoding included
            asked = time.perf_counter()
            try:
                for frame in frames:
                    while waiting and waiting[0].time <= frame.time:
                        query = waiting.pop(0)
                        session.ask(query.text)
                        recording.queries.append(query._replace(time=frame.time))
                        say(f"{frame.time:7.1f}s  {'query':8s}  {query.text}")
                    event = session.see(frame)
                    recording.add(event)
                    if event.text or event.state != state:
                        say(str(event))
                    state = event.state
                    now = time.perf_counter()
                    costs.append(event.latency if late_are_dropped else now - asked)
                    asked = now
                    bar.set_postfix_str(f"{state}, {1000 * event.latency:.0f} ms")
                    bar.update()
            except KeyboardInterrupt:  # a live stream ends when one stops it; what was seen is kept
                say("stopped")
            except (CacheFullError, VideoError) as error:  # the same where it breaks off by itself
                failure = error

    replies = sum(event.text is not None for event in recording.events)
    median = f"; median {1000 * statistics.median(costs):.1f} ms a frame" if costs else ""
    print(f"{len(costs)} frames, {replies} replies{median}", flush=True)
    if waiting:
        print(f"not asked, the video ended before: {', '.join(f'{q.time:g}:{q.text}' for q in waiting)}")
    if video.lost or video.warnings:
        print(video.summary)
    print(f"written to {_OUT.value}: {', '.join(Recording.NAMES)}")
    if not isinstance(frames, Video):
        again = f", reconnects: {frames.reconnects}" if isinstance(frames, LiveVideo) else ""
        print(f"late frames dropped: {frames.dropped}{again}")
    if failure is not None:
        raise failure


if __name__ == "__main__":
    command.run(main)
