"""A model and its baselines sit the same exam, and one table tells how they did.

The folder of the run holds what the model did, and a folder in it what each baseline did:

    progress.jsonl      a line for each question that is done; a run that was killed goes on from there
    predictions.json    the answers in the official form
    report.json, …      as the scorer of the benchmark writes it for any predictions, with the protocol's rules
    speed.json          how long it took, and what it waited for: of this start alone, and in no report
    comparison.md       the model beside its baselines

A baseline is `always_silent`, `always_respond`, or a memory such as `last_frames:4`: the same model, that sees no more.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from jstream.config import ConfigError
from jstream.data.prepare.videos import Folder
from jstream.data.video import VideoError, open_video
from jstream.evals import report
from jstream.evals.exam import Exam, Question, always_respond, always_silent, answers_of
from jstream.evals.progress import Progress
from jstream.evals.records import note
from jstream.evals.report import Report
from jstream.evals.runner import Clock, sit, told
from jstream.model import Model
from jstream.streaming.engine import Engine
from jstream.streaming.memory import OFTEN_SAID, capacity_for, parse_memory
from jstream.streaming.stream import MAX_QUERY

SCRIPTED = {"always_silent": always_silent, "always_respond": always_respond}
BASELINES = (*SCRIPTED, "last_frames:4")
MEMORY = "sinks:120"  # as many turns as Streamo sees on OVO-Bench
MAX_NEW_TOKENS = 64  # of a reply
MAX_CAPACITY = 1 << 16  # tokens, where everything is kept
_UNKNOWN = 600  # frames of a video that does not say
_TOLD = 20  # reasons for failures that a report names

FAILED = "A question is wrong whose video is missing, cannot be read, or outgrows the cache."


@dataclasses.dataclass(frozen=True)
class Contest:
    """What a run is about.

    Attributes:
        exam: under its protocol.
        annotations: its file.
        score: gives the report of a file of predictions.
        videos: the folder with the videos.
        out: the folder of the run.
        about: what answers depend on beside the memory: checkpoint, protocol and the like; JSON values.
        model: opens the model; called once at most, where a question is left for it.
        streams: questions at once.
        fps: frames a second.
        int8_cache: as for `Engine`.
    """

    exam: Exam
    annotations: pathlib.Path
    score: Callable[[pathlib.Path], Report]
    videos: pathlib.Path
    out: pathlib.Path
    about: Mapping[str, Any]
    model: Callable[[], Model]
    streams: int = 8
    fps: float = 1.0
    int8_cache: bool = False

    @functools.cached_property
    def folder(self) -> Folder:
        return Folder(self.videos)

    @functools.cached_property
    def loaded(self) -> Model:
        return self.model()


def hold(contest: Contest, memory: str, baselines: Sequence[str]) -> dict[str, Report]:
    """Has the model and each baseline sit the exam, and writes all that came of it; goes on where a run was killed.

    Returns:
        The reports: of `model`, and of the baselines by their names.

    Raises:
        ConfigError: for an unknown memory or baseline, or a folder of a run with other settings.
        DialogueError: the annotations cannot be scored.
    """
    for name in {memory, *baselines} - SCRIPTED.keys():
        parse_memory(name)
    if memory in SCRIPTED or memory in baselines:
        raise ConfigError(f"memory: expected one that is no baseline, found {memory!r}")
    found: dict[str, Report] = {}
    for name in [name for name in baselines if name in SCRIPTED]:  # before the model: a bad file shows at once
        answers = answers_of(contest.exam, SCRIPTED[name])
        found[name] = _write(contest, {"baseline": name}, contest.out / name, answers)
    for name in ("model", *(name for name in baselines if name not in SCRIPTED)):
        out = contest.out if name == "model" else contest.out / name.replace(":", "-")
        found[name] = _sit(contest, name, memory if name == "model" else name, out)
    found = {name: found[name] for name in ("model", *dict.fromkeys(baselines))}
    with report.whole_files(contest.out, ["comparison.md"]) as partial:
        partial["comparison.md"].write_text(table(found) + "\n", encoding="utf-8", errors="backslashreplace")
    return found


def table(found: Mapping[str, Report]) -> str:
    """The metrics of all, side by side."""
    names = list(found)
    rows = [("metric", *names)]
    for metric in found[names[0]].metrics:
        values = [found[name].metrics.get(metric) for name in names]
        rows.append((metric, *("–" if value is None else f"{value:.2f}" for value in values)))
    return report.aligned(rows)


def _sit(contest: Contest, name: str, memory: str, out: pathlib.Path) -> Report:
    """The exam of the model with a memory, from where it was left."""
    digest = hashlib.sha256(contest.annotations.read_bytes()).hexdigest()
    settings = {**contest.about, "memory": memory, "fps": contest.fps, "int8_cache": contest.int8_cache}
    questions, clock, began = contest.exam.questions, Clock(), time.perf_counter()
    with Progress(out / "progress.jsonl", {**settings, "annotations": digest}) as progress:
        failed = progress.failures()
        left = {key: one for key, one in questions.items() if key not in progress.done or key in failed}
        groups, unseen = _groups(contest, left) if left else ([], {})
        done = len(questions) - len(left)
        with tqdm(total=len(questions), initial=done, unit="question", dynamic_ncols=True, desc=name) as bar:
            for key, why in unseen.items():
                progress.add(key, {"answer": None, "failure": why})
                bar.update()
            for group in groups:
                engine = _engine(contest, memory, group)
                clock.compiled += engine.compile_seconds
                for key, answer, failure, short in sit(engine, group.questions, contest.folder, contest.fps, clock):
                    faults = {"failure": failure} if failure else {"short": True} if short else {}
                    progress.add(key, {"answer": answer, **faults})
                    bar.update()
                del engine  # its cache goes before another is made
        failed = progress.failures()
        answers = {key: progress.done[key].get("answer") for key in questions}
        short = [key for key in questions if progress.done[key].get("short")]
    if left:
        _write_speed(out, name, clock, time.perf_counter() - began)
    notes = _notes({key: failed[key] for key in questions if key in failed})
    notes += note("questions of which a video ended early", short)
    return _write(contest, {**settings, "videos": str(contest.videos)}, out, answers, notes)


def _notes(failed: Mapping[str, str]) -> list[str]:
    """Why questions failed, a line for each reason."""
    reasons: dict[str, list[str]] = collections.defaultdict(list)
    for key, why in failed.items():
        reasons[why].append(key)
    notes = [line for why, keys in reasons.items() for line in note(f"questions that failed, {why:.200}", keys)]
    more = len(notes) - _TOLD
    return notes if more <= 0 else [*notes[:_TOLD], f"reasons besides for which questions failed: {more}"]


class _Group(NamedTuple):
    """Questions about videos of one geometry: the model for it, and the frames of the longest video."""

    model: Model
    questions: dict[str, Question]
    frames: int


def _groups(contest: Contest, questions: Mapping[str, Question]) -> tuple[list[_Group], dict[str, str]]:
    """Questions by the geometry that their videos give the model, and why those cannot be asked that cannot."""
    groups: dict[Any, _Group] = {}
    unseen: dict[str, str] = {}
    by_video: dict[str, list[str]] = collections.defaultdict(list)
    for key, question in questions.items():
        by_video[question.video].append(key)
    for name, keys in tqdm(by_video.items(), unit="video", dynamic_ncols=True, desc="opening", leave=False):
        path = contest.folder.find(name)
        try:
            if isinstance(path, str):
                raise VideoError(f"{name}: {path}")
            with open_video(path, contest.fps) as video:
                frames, model = video.num_frames or _UNKNOWN, contest.loaded.for_frames(video.height, video.width)
        except (VideoError, OSError) as error:
            unseen |= dict.fromkeys(keys, told(error, path))
            continue
        group = groups.get(model.config.vision) or _Group(model, {}, 0)
        asked = group.questions | {key: questions[key] for key in keys}
        groups[model.config.vision] = _Group(group.model, asked, max(frames, group.frames))
    return list(groups.values()), unseen


def _engine(contest: Contest, memory: str, group: _Group) -> Engine:
    capacity = None
    if parse_memory(memory).turns is None:
        longest = ["?" * MAX_QUERY] * 2  # a prompt of any benchmark
        capacity = min(capacity_for(group.model.protocol, group.frames, longest, OFTEN_SAID), MAX_CAPACITY)
    return Engine(
        group.model,
        min(contest.streams, len(group.questions)),
        memory,
        capacity,
        contest.fps,
        max_new_tokens=MAX_NEW_TOKENS,
        int8_cache=contest.int8_cache,
    )


# -------------------------------------------------------------------------------------------------------------- writing


def _write(
    contest: Contest, about: Mapping[str, Any], out: pathlib.Path, answers: Mapping[str, Any], notes: Sequence[str] = ()
) -> Report:
    """Writes the answers in the official form, has them scored from there, and writes the report."""
    with report.whole_files(out, ["predictions.json"]) as partial:
        text = json.dumps(contest.exam.predictions(answers), ensure_ascii=False, indent=1)
        partial["predictions.json"].write_text(text + "\n", encoding="utf-8", errors="backslashreplace")
    found = contest.score(out / "predictions.json")
    rules = {f"protocol, {what}": rule for what, rule in {**contest.exam.rules, "failed": FAILED}.items()}
    found = dataclasses.replace(found, rules={**found.rules, **rules}, notes=(*found.notes, *notes))
    about = {"annotations": str(contest.annotations), **about}
    report.write(found, out, {what: str(value) for what, value in about.items()})
    return found


def _write_speed(out: pathlib.Path, name: str, clock: Clock, seconds: float) -> None:
    """Writes what this start took, and prints it."""
    running = max(seconds - clock.compiled, 1e-9)
    bound = "decoding" if clock.waited > clock.model else "the model"
    rates = {"questions_per_second": clock.questions / running, "frames_per_second": clock.frames / running}
    content = {"seconds": seconds, **rates, **dataclasses.asdict(clock), "bound_by": bound}
    content = {key: round(value, 3) if isinstance(value, float) else value for key, value in content.items()}
    with report.whole_files(out, ["speed.json"]) as partial:
        partial["speed.json"].write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"{name}: {clock.questions} questions, {clock.frames} frames in {seconds:.1f} s "
        f"({clock.frames / running:.1f} frames/s after compiling {clock.compiled:.1f} s): model {clock.model:.1f} s, "
        f"waiting for frames {clock.waited:.1f} s, decoding {clock.decode:.1f} s beside it; bound by {bound}",
        flush=True,
    )
