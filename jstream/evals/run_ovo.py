"""OVO-Bench as an exam: what is asked, when, and what a decision becomes in the official file of predictions.

`official`: as JoeLeelyf/OVO-Bench runs a model (`utils/OVOBench.py`): a clip and a prompt for each question or probe.
`streaming`: as Streamo runs one (maifoundations/Streamo, `scripts/benchmark/ovo_script.py`): one stream for each
question, or step of SSR, in which the model says when it knows. How it makes probes of replies is not published: that
part is ours. Prompts are those of the two files, but for blanks at the ends of lines.
"""

import pathlib
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jstream.data.dialogue import DialogueError
from jstream.evals.exam import Asking, Exam, Question, Said, Watch
from jstream.evals.ovo_bench import CATEGORIES
from jstream.evals.records import id_of, list_of, number, object_of, read_json, text_of
from jstream.protocols.protocol import span_in

LETTERS = "ABCDEFGHIJ"
ALWAYS = "From 0s to 86400s"  # the span of one who always answers

PROTOCOLS = {
    "official": {
        "clip": "A question or probe has a stream of its own, from the start of the video to its realtime.",
        "asking": "The prompt is heard with the last frame and answered there (the reply is forced, not decided); "
        "nothing is said before.",
        "guess": "One who always responds says A, Yes and 1.",
    },
    "streaming": {
        "clip": "A question, or a step of SSR, has a stream of its own, from the start of the video to the first reply "
        "or the end of the video; REC goes on after replies, and ends like CRR with the last probe.",
        "asking": "Choices are asked at realtime, ASI at a second before it that the seed draws, CRR at ask_time, a "
        "step of SSR at its start, REC 3 s before the first start; with the frame of that second, or the last frame "
        "where the video ends before. From then on the model decides; before it is silent.",
        "choice": "The letter that the first reply begins with, or else the whole of it.",
        "CRR": "A probe is Yes if the first reply came in a frame before its realtime.",
        "SSR": "A probe is Yes if its realtime lies in the span of seconds that the first reply names, which may come "
        "later than the probe; a reply without a span is none.",
        "REC": "A probe has the count of the last reply in a frame before its realtime, 0 before the first: a letter A "
        "to J as its option says, else a number; a reply without either is none.",
        "guess": f"One who always responds says A, and of steps of SSR {ALWAYS}.",
    },
}

_CHOICE = """Question: {question}
Options:
{options}
Respond only with the letter corresponding to your chosen option (e.g., A, B, C).
Do not include any additional text or explanation in your response."""
_REC = """You're watching a video in which people may perform a certain type of action repetively.
The person performing this kind of action are referred to as 'they' in the following statement.
You're task is to count how many times have different people in the video perform this kind of action in total.
One complete motion counts as one.
Now, answer the following question: How many times did they {activity}?
Provide your answer as a single number (e.g., 0, 1, 2, 3…) indicating the total count.
Do not include any additional text or explanation in your response."""
_SSR = """You're watching a tutorial video which contain a sequential of steps.
The following is one step from the whole procedures:
{step}
Your task is to determine if the man or woman in the video is currently performing this step.
Answer only with “Yes” or “No”.
Do not include any additional text or explanation in your response."""
_CRR = """You're responsible of answering questions based on the video content.
The following question are relevant to the latest frames, i.e. the end of the video.
{question}
Decide whether existing visual content, especially latest frames, i.e. frames that near the end of the video, provide \
enough information for answering the question.
Answer only with “Yes” or “No”.
Do not include any additional text or explanation in your response."""

_STREAMING_CHOICE = (
    "{question}\n{options}\nPlease provide your answer by stating the letter followed by the full option."
)
_STREAMING_SSR = (
    "Watch the following video and temporally localize the event. Respond once it has finished and summarize its time "
    "period. The given event is:\n'{step}'"
)
_STREAMING_REC = (
    "How many times did activity '{activity}' occur?\n{options}. Please respond with only the letter of the correct "
    "answer. Update your answer if it becomes different at a later time."
)
_COUNTS = "\n".join(f"{letter}. {count}" for count, letter in enumerate(LETTERS, start=1))


def exam(annotations: pathlib.Path, protocol: str, seed: int = 0) -> Exam:
    """The exam of an annotation file.

    Args:
        protocol: a key of `PROTOCOLS`.
        seed: of the times of ASI in `streaming`; each question draws by its id.

    Raises:
        DialogueError: a question lacks what is to be asked, or has the id of another.
    """
    records, questions = {}, {}
    for index, item in enumerate(list_of({"questions": read_json(annotations)}, "questions", str(annotations))):
        where = f"{annotations}, record {index}"
        record = object_of(item, where)
        name = str(id_of(record, "id", where))
        if name in records:
            raise DialogueError(f"{where}: expected an id of its own, found {name!r} a second time")
        records[name] = record
        begin = _official(record, where) if protocol == "official" else _streaming(record, where, f"{seed}:{name}")
        questions[name] = Question(text_of(record, "video", where), begin)
    return Exam(questions, PROTOCOLS[protocol], lambda answers: _predictions(records, answers))


def _predictions(records: Mapping[str, dict[str, Any]], answers: Mapping[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {category: [] for category in CATEGORIES}
    for name, record in records.items():
        category = next((key for key, tasks in CATEGORIES.items() if record["task"] in tasks), "backward")
        answer = answers.get(name)
        if category == "forward":
            replies = [None] * len(record["test_info"]) if answer is None else answer
            probes = [probe | {"response": reply} for probe, reply in zip(record["test_info"], replies, strict=True)]
            found[category].append(record | {"test_info": probes})
        else:
            kept = {key: record[key] for key in ("id", "video", "task", "question")}
            truth = {"ground_truth": LETTERS[record["gt"]]} if record.get("gt") in range(len(LETTERS)) else {}
            found[category].append(kept | {"response": answer} | truth)
    return found


def _options(record: Mapping[str, Any], where: str) -> list[str]:
    options = list_of(record, "options", where)
    return [f"{letter}. {option}" for letter, option in zip(LETTERS, options)]


def _probes(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    probes = [object_of(probe, where) for probe in list_of(record, "test_info", where)]
    for probe in probes:
        number(probe.get("realtime"), f"{where}, a probe's realtime")
    return probes


def _first(said: Iterable[Said]) -> str | None:
    return next((reply.text for reply in said), None)


# ------------------------------------------------------------------------------------------------------------- official


def _official(record: Mapping[str, Any], where: str) -> Callable[[], Asking]:
    task = text_of(record, "task", where)
    if task not in CATEGORIES["forward"]:
        options = "; ".join(_options(record, where)) + ";"
        prompt = _CHOICE.format(question=text_of(record, "question", where), options=options)
        end = number(record.get("realtime"), f"{where}, realtime")

        def choose() -> Asking:
            return _first((yield Watch(prompt, "A", until=end, forced=True)))

        return choose

    def prompt_of(probe: Mapping[str, Any]) -> str:
        if task == "REC":
            return _REC.format(activity=text_of(record, "activity", where))
        if task == "SSR":
            return _SSR.format(step=text_of(probe, "step", where))
        return _CRR.format(question=text_of(record, "question", where))

    prompts = [(prompt_of(probe), float(probe["realtime"])) for probe in _probes(record, where)]
    guess = "1" if task == "REC" else "Yes"

    def probe() -> Asking:
        replies = []
        for prompt, end in prompts:
            replies.append(_first((yield Watch(prompt, guess, until=end, forced=True))))
        return replies

    return probe


# ------------------------------------------------------------------------------------------------------------ streaming


def _streaming(record: Mapping[str, Any], where: str, key: str) -> Callable[[], Asking]:
    task = text_of(record, "task", where)
    if task not in CATEGORIES["forward"]:
        asked = text_of(record, "question", where)
        prompt = _STREAMING_CHOICE.format(question=asked, options="\n".join(_options(record, where)))
        at = int(number(record.get("realtime"), f"{where}, realtime"))
        if task == "ASI":
            at = random.Random(key).randint(0, max(at, 0))
        return lambda: _choose(prompt, at)

    probes = _probes(record, where)
    times = [float(probe["realtime"]) for probe in probes]
    last = max(times, default=0.0)
    if task == "CRR":
        at = int(number(record.get("ask_time"), f"{where}, ask_time"))
        return lambda: _wait(text_of(record, "question", where), at, last, times)
    if task == "REC":
        starts = list_of(record, "start_times", where)
        at = int(max(number(starts[0] if starts else 0, f"{where}, start_times") - 3, 0))
        prompt = _STREAMING_REC.format(activity=text_of(record, "activity", where), options=_COUNTS)
        return lambda: _count(prompt, at, last, times)
    starts = dict(zip(list_of(record, "all_steps", where), list_of(record, "start_time", where)))
    asked = [(text_of(probe, "step", where), time) for probe, time in zip(probes, times)]
    steps = {step: int(number(starts.get(step, 0), f"{where}, start_time")) for step, _ in asked}
    return lambda: _ground(steps, asked)


def _choose(prompt: str, at: float) -> Asking:
    reply = _first((yield Watch(prompt, "A", at)))
    letter = re.match(rf"\W*([{LETTERS}])\b", reply) if reply is not None else None
    return letter[1] if letter else reply


def _wait(prompt: str, at: float, last: float, times: list[float]) -> Asking:
    said = yield Watch(prompt, "A", at, until=last)
    return ["Yes" if any(reply.time < time for reply in said) else "No" for time in times]


def _count(prompt: str, at: float, last: float, times: list[float]) -> Asking:
    said = yield Watch(prompt, "A", at, until=last, first=False)
    counts = [(reply.time, count) for reply in said if (count := counted(reply.text)) is not None]
    return [str(next((count for when, count in reversed(counts) if when < time), 0)) for time in times]


def counted(reply: str) -> int | None:
    """The count that a reply names: by the letter of its option, else as a number."""
    letter, digits = re.search(rf"\b[{LETTERS}]\b", reply), re.search(r"\d{1,9}", reply)
    return LETTERS.index(letter[0]) + 1 if letter else int(digits[0]) if digits else None


def _ground(steps: Mapping[str, float], asked: list[tuple[str, float]]) -> Asking:
    spans = {}
    for step, at in steps.items():
        reply = _first((yield Watch(_STREAMING_SSR.format(step=step), ALWAYS, at)))
        spans[step] = span_in(reply) if reply is not None else None
    holds = lambda span, time: span is not None and span[0] <= time <= span[1]
    return ["Yes" if holds(spans[step], time) else "No" for step, time in asked]
