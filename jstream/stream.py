"""Watches a video: `python -m jstream.stream [--video=clip.mp4] [--query="12:What colour is the circle now?"] …`.

With no flags the bundled model watches the bundled clip. Prints what happens as it happens, and writes `events.jsonl`,
`captions.vtt` and `timeline.png` to one folder.
"""

import json
import re
import statistics
import sys
import time

from absl import flags
from tqdm import tqdm

from jstream import command
from jstream.config import ConfigError
from jstream.data.dialogue import Query
from jstream.data.video import Video, open_video, paced
from jstream.model import Model
from jstream.models.cache import CacheFullError
from jstream.protocols.streamo import Turn
from jstream.streaming.recording import Recording
from jstream.streaming.session import MAX_QUERY, Session
from jstream.weights.checkpoint import BUNDLED, load_model

_VIDEO = flags.DEFINE_string("video", "", "File or URL to watch; the bundled clip by default.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", str(BUNDLED), "Model folder; the bundled model by default.")
_QUERY = flags.DEFINE_multi_string("query", [], 'What to ask, with the second to ask it at: "12:What colour is it?".')
_FPS = flags.DEFINE_float("fps", 1.0, "Frames a second the model sees.", lower_bound=0.01, upper_bound=60.0)
_OUT = flags.DEFINE_string("out", "runs/stream", "Folder for events.jsonl, captions.vtt and timeline.png.")
_REALTIME = flags.DEFINE_bool("realtime", False, "Keep to the clock, as a camera would: late frames are dropped.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "Speak when p(response) reaches this.", 0.0, 1.0)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Of replies; 0 is greedy.", lower_bound=0.0)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "A reply is cut there.", 1, 4096)

_DEFAULT_QUERY = "0:Narrate what happens."
_UNKNOWN_LENGTH = 600  # turns to hold for a stream that does not say how long it is
_SPARE = 2.0  # room for replies: cache slots for every slot that silent turns take


def parse_query(text: str) -> Query:
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
    return Query(question, float(seconds))


def capacity_for(model: Model, video: Video) -> int:
    """Cache slots that a whole video takes, rounded up."""
    protocol = model.protocol
    turn = len(protocol.close_turn(0)) + len(protocol.open_turn(Turn(100, 101)))
    turns = video.num_frames or _UNKNOWN_LENGTH
    return -(-int(_SPARE * turn * (turns + 8)) // 256) * 256


def main() -> None:
    began = time.perf_counter()
    bundled = not _VIDEO.value
    texts = _QUERY.value
    if not texts:
        texts = json.loads((BUNDLED / "clip.json").read_text())["queries"] if bundled else [_DEFAULT_QUERY]
    waiting = sorted(map(parse_query, texts), key=lambda query: query.time)
    model = load_model(_CHECKPOINT.value)

    with open_video(BUNDLED / "clip.mp4" if bundled else _VIDEO.value, fps=_FPS.value) as video:
        session = Session(
            model,
            capacity=capacity_for(model, video),
            fps=_FPS.value,
            threshold=_THRESHOLD.value,
            temperature=_TEMPERATURE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
        )
        print(
            f"ready after {time.perf_counter() - began:.1f} s, of which compiling {session.compile_seconds:.1f} s",
            flush=True,
        )
        frames = paced(video) if _REALTIME.value else video
        name = "bundled clip" if bundled else str(_VIDEO.value)
        say = lambda line: tqdm.write(line, file=sys.stdout)
        with (
            Recording(_OUT.value, waiting, title=name) as recording,
            tqdm(total=video.num_frames, unit="frame", dynamic_ncols=True) as bar,
        ):
            costs, state, full = [], "", None  # seconds a frame, its decoding included
            asked = time.perf_counter()
            try:
                for frame in frames:
                    while waiting and waiting[0].time <= frame.time:
                        query = waiting.pop(0)
                        session.ask(query.text)
                        say(f"{frame.time:7.1f}s  {'query':8s}  {query.text}")
                    event = session.see(frame)
                    recording.add(event)
                    if event.text or event.state != state:
                        say(str(event))
                    state = event.state
                    now = time.perf_counter()
                    costs.append(now - asked if not _REALTIME.value else event.latency)
                    asked = now
                    bar.set_postfix_str(f"{state}, {1000 * event.latency:.0f} ms")
                    bar.update()
            except KeyboardInterrupt:  # a live stream ends when one stops it; what was seen is kept
                say("stopped")
            except CacheFullError as error:
                full = error

    replies = sum(event.text is not None for event in recording.events)
    print(
        f"{len(costs)} frames, {replies} replies; median {1000 * statistics.median(costs):.1f} ms a frame", flush=True
    )
    if waiting:
        print(f"not asked, the video ended before: {', '.join(f'{q.time:g}:{q.text}' for q in waiting)}")
    if video.lost or video.warnings:
        print(video.summary)
    if _REALTIME.value:
        print(f"{frames.dropped} late frames dropped")  # type: ignore[union-attr]
    print(f"written to {_OUT.value}: {', '.join(Recording.NAMES)}")
    if full is not None:
        raise full


if __name__ == "__main__":
    command.run(main)
