"""The world benchmark: a model watches fresh videos of the synthetic world; scored is when it spoke and what it said.

Every world is written as H.264 and read back at one frame a second, as a user's video would come, and every task it
offers is played as one stream. `METRICS` is the table of what is measured and by which rule. The dialogues are those
that `python -m jstream.data.world` writes for the same seed. A model is only met through `play`.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from tqdm import tqdm

from jstream.config import ConfigError
from jstream.data import world as worlds
from jstream.data.dialogue import interval_iou
from jstream.data.video import Frame, VideoError, open_video
from jstream.evals.metrics import TOLERANCE, Reply, bootstrap, match_replies, ratio
from jstream.evals.report import aligned, whole_files
from jstream.protocols.protocol import STATES, StreamProtocol, Turn, span_in
from jstream.protocols.streamo import turns_of
from jstream.streaming.event import Event
from jstream.streaming.memory import capacity_for

VIDEO_FPS = 8  # of the written videos, as `python -m jstream.data.world` has it
TASKS = tuple(worlds.TASKS)
FILES = ("predictions.jsonl", "report.md", "report.json")
BACKWARD_WINDOW = 3  # turns from a question about the past in which its answer is looked for, its own among them


class Stream(Protocol):
    """What is needed of a `Session`."""

    def reset(self) -> None: ...

    def ask(self, text: str) -> None: ...

    def see(self, frame: Frame) -> Event: ...


@dataclasses.dataclass(frozen=True)
class Sample:
    """A dialogue of a task, laid over the frames of its world, one a second."""

    world: worlds.World
    task: str
    turns: tuple[Turn, ...]


@dataclasses.dataclass(frozen=True)
class Played:
    """A sample and what the model made of it: one event a turn."""

    sample: Sample
    events: tuple[Event, ...]

    @property
    def turns(self) -> tuple[Turn, ...]:
        return self.sample.turns

    @functools.cached_property
    def said(self) -> list[str | None]:
        """The reply of the model in each turn, or None; a response without words is none."""
        return [(e.text or "").strip() or None if e.state == "response" else None for e in self.events]

    @functools.cached_property
    def expected(self) -> list[str | None]:
        """The reply of the reference in each turn, or None."""
        return [turn.reply and turn.reply.strip() for turn in self.turns]

    @functools.cached_property
    def windows(self) -> list[tuple[int, int]]:
        """For each turn with a query: the turn, and the turn of the next query or the end of the video."""
        asked = [i for i, turn in enumerate(self.turns) if turn.query is not None]
        return list(zip(asked, [*asked[1:], len(self.turns)]))

    def replies(self, texts: Sequence[str | None], without: Sequence[int] = ()) -> list[Reply]:
        """`said` or `expected` as replies with their times, without those of some turns."""
        return [Reply(self.turns[i].start, t) for i, t in enumerate(texts) if t is not None and i not in without]


# -------------------------------------------------------------------------------------------------------------- playing


def make_samples(seed: int, num_videos: int, tasks: Sequence[str] = TASKS) -> list[Sample]:
    """All that the worlds 0 … num_videos − 1 of a seed offer for the tasks, world by world.

    Raises:
        ConfigError: for an unknown task, no video, or a negative seed.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"task: expected one of {', '.join(TASKS)}, found {task!r}")
    if num_videos < 1:
        raise ConfigError(f"num_videos: expected at least 1, found {num_videos}")
    if seed < 0:
        raise ConfigError(f"seed: expected 0 or more, found {seed}")
    samples = []
    for index in range(num_videos):
        world = worlds.make_world(seed, index)
        for number, task in enumerate(TASKS):
            # The key of `data.world.write`; a shorter one would repeat the random numbers that the world was made from.
            dialogue = worlds.make_dialogue(world, task, worlds.generator(seed, index, 2, number))
            if task in tasks and dialogue is not None:
                samples.append(Sample(world, task, tuple(turns_of(dialogue, world.duration))))
    return samples


def room_for(samples: Sequence[Sample], protocol: StreamProtocol, max_new_tokens: int) -> int:
    """Tokens a cache must hold so that no sample fills it, even by a model that speaks at length in every turn."""

    def tokens(sample: Sample) -> int:
        queries = [turn.query for turn in sample.turns if turn.query is not None]
        return capacity_for(protocol, len(sample.turns), queries, max_new_tokens)

    return max(map(tokens, samples), default=0)


def frames_of(world: worlds.World, size: int, rendered: bool = False) -> list[Frame]:
    """The frames of a world at one a second, uint8 [S, S, 3].

    Args:
        size: S in pixels; one more where it is odd, which H.264 cannot hold.
        rendered: whether they come from the renderer instead of through a video file.
    """
    size += size % 2
    if rendered:
        draw = worlds.Renderer(world, size)
        return [Frame(float(second), draw(float(second))) for second in range(world.duration)]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "world.mp4"
        worlds.write_video(world, path, size, VIDEO_FPS)
        with open_video(path, fps=1) as video:
            frames = list(video)
    if len(frames) != world.duration:
        raise VideoError(f"world {world.index}: expected {world.duration} frames of its video, found {len(frames)}")
    return frames


def play(session: Stream, frames: Sequence[Frame], turns: Sequence[Turn]) -> list[Event]:
    """Plays one dialogue as a stream of its own: what is asked in a turn is said before its frame."""
    session.reset()
    events = []
    for frame, turn in zip(frames, turns, strict=True):
        if turn.query is not None:
            session.ask(turn.query)
        events.append(session.see(frame))
    return events


def play_all(
    session: Stream, samples: Sequence[Sample], size: int, rendered: bool = False, progress: bool = False
) -> Iterator[Played]:
    """Plays samples in order; those of one world share its frames."""
    world, frames = None, []
    with tqdm(total=sum(len(s.turns) for s in samples), unit="frame", dynamic_ncols=True, disable=not progress) as bar:
        for sample in samples:
            if sample.world is not world:
                world, frames = sample.world, frames_of(sample.world, size, rendered)
            yield Played(sample, tuple(play(session, frames, sample.turns)))
            bar.update(len(sample.turns))


# ------------------------------------------------------------------------------------------------------------ measuring
# The part of one dialogue in a metric: (numerator, denominator). The metric is the ratio of their sums over dialogues.

Part = tuple[float, float]


def state_accuracy(played: Played) -> Part:
    """Turns with the reference's state, of all turns."""
    right = sum(event.state == STATES[turn.state] for turn, event in zip(played.turns, played.events))
    return right, len(played.turns)


def state_recall(played: Played, state: str) -> Part:
    """Turns of a state that the model gave that state, of those the reference gives it."""
    found = [event.state == state for turn, event in zip(played.turns, played.events) if STATES[turn.state] == state]
    return sum(found), len(found)


def state_precision(played: Played, state: str) -> Part:
    """Turns of a state that the reference gives that state, of those the model gave it."""
    right = [STATES[turn.state] == state for turn, event in zip(played.turns, played.events) if event.state == state]
    return sum(right), len(right)


def reply_f1(played: Played, exact: bool) -> Part:
    """Twice the matched replies, of predicted and reference replies together."""
    said, expected = played.replies(played.said), played.replies(played.expected)
    return 2 * len(match_replies(said, expected, exact=exact)), len(said) + len(expected)


def exact_recall(played: Played) -> Part:
    """Reference replies that were said word for word at a right time, of all."""
    expected = played.replies(played.expected)
    return len(match_replies(played.replies(played.said), expected, exact=True)), len(expected)


def _questions(played: Played) -> list[int]:
    """The turns of questions that are to be answered at once."""
    return [i for i, turn in enumerate(played.turns) if turn.query is not None and turn.reply is not None]


def answer_accuracy(played: Played) -> Part:
    """Questions whose own turn has the reference's whole reply word for word, of those to be answered at once."""
    questions = _questions(played)
    return sum(played.said[i] == played.expected[i] for i in questions), len(questions)


def update_accuracy(played: Played) -> Part:
    """Later answers said word for word at a right time, of all; replies in the turn of a question are none of them."""
    questions = _questions(played)
    expected = played.replies(played.expected, without=questions)
    return len(match_replies(played.replies(played.said, without=questions), expected, exact=True)), len(expected)


_NUMBER = re.compile(r"\d+\.?")


def count_accuracy(played: Played) -> Part:
    """Reference replies that are a number, and by which turn's end the last number said was the same, of all.

    As in OVO-Bench's REC, what counts is where the count stands, not how often it was told.
    """
    is_number = lambda text: text is not None and _NUMBER.fullmatch(text) is not None
    changes = [i for i, text in enumerate(played.expected) if is_number(text)]
    right = 0
    for i, after in zip(changes, [*changes[1:], len(played.turns)]):
        in_time = [j for j in range(i + 1, after) if played.turns[j].start - played.turns[i].start <= TOLERANCE]
        said = [text for text in played.said[: max([i, *in_time]) + 1] if is_number(text)]
        right += bool(said) and said[-1] == played.expected[i]
    return right, len(changes)


def _first(texts: Sequence[str | None], begin: int, end: int) -> int | None:
    return next((i for i in range(begin, min(end, len(texts))) if texts[i] is not None), None)


def _interval(reply: str | None) -> tuple[float, float] | None:
    """The span a reply names, [start − 1, end): both turns are in it, and a turn is named by the second it ends at."""
    span = span_in(reply) if reply is not None else None
    return None if span is None else (span[0] - 1, span[1])


def _groundings(played: Played, turns: int | None) -> list[tuple[int, int | None]]:
    """For each query with a reference reply in its window: the turns of that reply and of the model's first reply.

    A window reaches from the query's turn to before the next query's, over at most `turns` turns where it is given.
    """
    found = []
    for begin, end in played.windows:
        end = end if turns is None else min(end, begin + turns)
        reference = _first(played.expected, begin, end)
        if reference is not None:
            found.append((reference, _first(played.said, begin, end)))
    return found


def span_iou(played: Played, turns: int | None = None) -> Part:
    """Sum of the IoU of named and reference spans, of queries; 0 for a reply that is missing or names none."""
    total, queries = 0.0, 0
    for reference, reply in _groundings(played, turns):
        wanted = _interval(played.expected[reference])
        if wanted is not None:
            named = None if reply is None else _interval(played.said[reply])
            total, queries = total + (interval_iou(named, wanted) if named else 0.0), queries + 1
    return total, queries


def span_timing(played: Played) -> Part:
    """Queries whose first reply comes at a right time, of all."""
    time, found = lambda i: played.turns[i].start, _groundings(played, None)
    return sum(b is not None and abs(time(a) - time(b)) <= TOLERANCE for a, b in found), len(found)


def false_responses(played: Played) -> Part:
    """Replies farther than the tolerance from every reference reply, of minutes."""
    expected = [reply.time for reply in played.replies(played.expected)]
    said = [reply.time for reply in played.replies(played.said)]
    minutes = sum(turn.end - turn.start for turn in played.turns) / 60
    return sum(all(abs(a - b) > TOLERANCE for b in expected) for a in said), minutes


def timing_error(played: Played) -> Part:
    """Sum of |Δt| over matched replies, whatever they say, of matched replies."""
    said, expected = played.replies(played.said), played.replies(played.expected)
    pairs = match_replies(said, expected)
    return sum(abs(said[i].time - expected[j].time) for i, j in pairs), len(pairs)


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measure: in which tasks, by which rule (one sentence), and its part of one dialogue."""

    tasks: tuple[str, ...]
    rule: str
    part: Callable[[Played], Part]


def _of_states(name: str, rule: str, part: Callable[..., Part]) -> dict[str, Metric]:
    return {f"{s}_{name}": Metric(TASKS, rule.format(s), functools.partial(part, state=s)) for s in STATES}


def _exact(task: str, what: str) -> Metric:
    rule = f"Share of the reference replies of {what} dialogues matched one to one, within ±1 s and word for word."
    return Metric((task,), rule, exact_recall)


METRICS = {
    "state_accuracy": Metric(TASKS, "Share of turns, over all tasks, with the state of the reference.", state_accuracy),
    **_of_states("recall", "Share of the turns where the reference is {0} in which the model is {0}.", state_recall),
    **_of_states(
        "precision", "Share of the turns where the model is {0} in which the reference is {0}.", state_precision
    ),
    "reply_timing_f1": Metric(
        TASKS,
        "2 · matches / (predicted + reference replies), pooled over all tasks; matches are one to one, ±1 s.",
        functools.partial(reply_f1, exact=False),
    ),
    "reply_f1": Metric(
        TASKS,
        "As reply_timing_f1, with matches that are also word for word; there are as many as there can be.",
        functools.partial(reply_f1, exact=True),
    ),
    "narration_timing_f1": Metric(
        ("narration",),
        "2 · matches / (predicted + reference replies), pooled over narration dialogues; matches are one to one, ±1 s.",
        functools.partial(reply_f1, exact=False),
    ),
    "narration_f1": Metric(
        ("narration",),
        "As narration_timing_f1, with matches that are also word for word; there are as many as there can be.",
        functools.partial(reply_f1, exact=True),
    ),
    "narration_exact": _exact("narration", "narration"),
    "caption_exact": _exact("event_caption", "event caption"),
    "action_caption_exact": _exact("action_caption", "action caption"),
    "tsqa_accuracy": Metric(
        ("tsqa", "mixed"),
        "Share of the questions of tsqa and mixed dialogues whose own turn has the reference's reply, word for word.",
        answer_accuracy,
    ),
    "tsqa_update_accuracy": Metric(
        ("tsqa",),
        "Share of the reference replies of tsqa dialogues outside the turns of questions that are matched one to one "
        "by replies outside them, within ±1 s and word for word.",
        update_accuracy,
    ),
    "count_accuracy": Metric(
        ("tsqa", "mixed"),
        "Share of the reference replies of tsqa and mixed dialogues that are a number, at which the last number said, "
        "up to 1 s later, is the same: how many there are or have been, first asked and at every change.",
        count_accuracy,
    ),
    "forward_miou": Metric(
        ("forward_grounding",),
        "Mean over queries of the IoU between the reference's span and that of the first reply from the query's turn "
        "to before the next query's, both as [start − 1 s, end); 0 where that reply is missing or names no span.",
        span_iou,
    ),
    "forward_timing": Metric(
        ("forward_grounding",),
        "Share of queries whose first reply before the next query comes within ±1 s of the reference's.",
        span_timing,
    ),
    "backward_miou": Metric(
        ("backward_grounding",),
        "As forward_miou, with the first reply in the query's turn or the 2 turns after it, before the next query's.",
        functools.partial(span_iou, turns=BACKWARD_WINDOW),
    ),
    "false_responses_per_minute": Metric(
        TASKS,
        "Replies more than 1 s from every reference reply, per minute of video, over all tasks.",
        false_responses,
    ),
    "timing_error_seconds": Metric(
        TASKS,
        "Mean |Δt| over the replies of all tasks that are matched one to one within ±1 s, whatever they say.",
        timing_error,
    ),
}


def score(all_played: Sequence[Played]) -> dict[str, Any]:
    """Metrics of played dialogues.

    Returns:
        By metric: `rules`, `metrics` (None without cases), `intervals` (95 % bootstrap over dialogues), and `counts`,
        which has under `cases` the denominator of each metric.
    """
    metrics, intervals, cases = {}, {}, {}
    for name, metric in METRICS.items():
        parts = [metric.part(played) for played in all_played if played.sample.task in metric.tasks]
        above, below = (sum(column) for column in zip(*parts)) if parts else (0, 0)
        metrics[name], cases[name] = _rounded(ratio(above, below)), _rounded(below)
        ends = bootstrap([a for a, _ in parts], [b for _, b in parts]) if parts else None
        intervals[name] = None if ends is None else [_rounded(end) for end in ends]
    tasks = collections.Counter(played.sample.task for played in all_played)
    counts = {
        "dialogues": {task: tasks[task] for task in TASKS if tasks[task]},
        "turns": sum(len(played.turns) for played in all_played),
        "queries": sum(len(played.windows) for played in all_played),
        "reference_replies": sum(len(played.replies(played.expected)) for played in all_played),
        "predicted_replies": sum(len(played.replies(played.said)) for played in all_played),
        "cases": cases,
    }
    rules = {name: metric.rule for name, metric in METRICS.items()}
    return {"rules": rules, "counts": counts, "metrics": metrics, "intervals": intervals}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


# -------------------------------------------------------------------------------------------------------------- writing


def evaluate(
    session: Stream,
    samples: Sequence[Sample],
    out: str | pathlib.Path,
    about: dict[str, Any],
    size: int,
    rendered: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Plays samples, scores them and writes `predictions.jsonl`, `report.md` and `report.json`.

    While it runs there is only `predictions.jsonl.partial`; the files get their names together at the end. Stopped or
    failed, it leaves none behind, and those of an earlier run in the folder stay as they were.

    Args:
        out: the folder, made where missing.
        about: opens the report: what was evaluated.
        size, rendered: see `frames_of`.

    Returns:
        What `report.json` holds.
    """
    with whole_files(out, FILES) as partial:
        all_played = []
        with partial["predictions.jsonl"].open("w", encoding="utf-8", errors="backslashreplace") as lines:
            for played in play_all(session, samples, size, rendered, progress):
                lines.write(json.dumps(_record(played), ensure_ascii=False) + "\n")
                all_played.append(played)
        report = {**about, "frames": "rendered" if rendered else "h264", **score(all_played)}
        partial["report.md"].write_text(markdown(report), encoding="utf-8")
        partial["report.json"].write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return report


def _record(played: Played) -> dict[str, Any]:
    """A line of `predictions.jsonl`; times are those of frames. Without latencies, so that a run repeats exactly."""
    said = lambda time, state, text: {"time": time, "state": state, "text": text}
    return {
        "task": played.sample.task,
        "seed": played.sample.world.seed,
        "index": played.sample.world.index,
        "queries": [{"time": turn.start, "text": turn.query} for turn in played.turns if turn.query is not None],
        "references": [said(turn.start, STATES[turn.state], turn.reply) for turn in played.turns],
        "events": [said(event.time, event.state, event.text) for event in played.events],
    }


def table(report: dict[str, Any]) -> str:
    """The metrics of a report as a Markdown table that also reads well on a terminal."""
    number = lambda value: "–" if value is None else f"{value:.3f}"
    rows = [("metric", "value", "95 % interval", "cases")]
    for name, value in report["metrics"].items():
        ends = report["intervals"][name]
        interval = "–" if ends is None else " – ".join(map(number, ends))
        rows.append((name, number(value), interval, f"{report['counts']['cases'][name]:g}"))
    return aligned(rows)


def markdown(report: dict[str, Any]) -> str:
    """A report to read: what was evaluated, the table, and the rules."""
    about = [f"- {name}: {value}" for name, value in report.items() if isinstance(value, str | int)]
    dialogues = ", ".join(f"{count} {task}" for task, count in report["counts"]["dialogues"].items())
    rules = [f"- `{name}`: {rule}" for name, rule in report["rules"].items()]
    cases = "Cases: what a metric is divided by (turns, replies, questions, minutes). The intervals resample dialogues."
    parts = ["# Evaluation", "\n".join([*about, f"- dialogues: {dialogues}"]), table(report), cases, "\n".join(rules)]
    return "\n\n".join(parts) + "\n"
