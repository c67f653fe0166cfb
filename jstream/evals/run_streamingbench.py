"""StreamingBench as an exam: what is asked, when, and what a decision becomes in the official file of predictions.

After THUNLP-MT/StreamingBench, `src/benchmark/StreamingBench.py`, `StreamingBenchSQA.py` and
`StreamingBenchProactive.py`, whose prompts these are. `official` polls for output on cue, as they do; in `streaming`
the model says when it is time.
"""

import copy
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jstream.data.dialogue import DialogueError
from jstream.data.sources.files import seconds
from jstream.evals.exam import Asking, Exam, Question, Watch
from jstream.evals.records import list_of, object_of, read_json, text_of

MODEL = "jstream"  # under which replies stand in the file of predictions
CONTEXT = 60.0  # seconds before a question that a clip has
LATE = 4  # seconds after the cue at which waiting ends

_CHOICES = {
    "clip": "A choice has a stream of its own, of the {context} before its time stamp.",
    "asking": "The prompt is heard with the last frame of the clip and answered there (the reply is forced, not "
    "decided); nothing is said before. In sqa it holds the right answers to the questions before.",
}
PROTOCOLS = {
    "official": _CHOICES
    | {
        "cue": "Each second from 1 s after the time stamp to 4 s after the cue ends a clip since the time stamp, with "
        "the question whether it is time to say the right text; at the first yes the instruction itself is asked.",
        "guess": "One who always responds says A and Yes.",
    },
    "streaming": _CHOICES
    | {
        "cue": "The instruction is heard with the frame of its time stamp, in a stream that has the {context} before; "
        "the model decides, and its first reply counts, at the second that its frame ends at. Waiting ends 4 s after "
        "the cue.",
        "guess": "One who always responds says A and Yes.",
    },
}

_CHOICE = (
    "You are an advanced video question-answering AI assistant. You have been provided with some frames from the video "
    "and a multiple-choice question related to the video. Your task is to carefully analyze the video and provide the "
    "best answer to question, choosing from the four options provided. Respond with only the letter (A, B, C, or D) of "
    "the correct option.\n\nQuestion: {question}\n\nOptions:\n{options}\n\nThe best option is:"
)
_SQA = (
    "You are an advanced video question-answering AI assistant. You have been provided with a video and a "
    "multiple-choice question related to the video. Your task is to carefully analyze the video and the provided "
    "context to answer the question, choosing from the four options provided. Respond with only the letter (A, B, C, "
    "or D) of the correct option.\n\n{context}\n\nHere is the question. Answer it and don't confuse it with the "
    "previous conversation.\nQuestion: {question}\n\nOptions:\n{options}\n\nThe best option is:"
)
_CONTEXT = (
    "Here are the contextual information related to the video. Please answer the questions based on the contextual "
    "information: "
)
_BEFORE = (
    "At timestamp {time}, the following question and answer occurred: Question: {question}; Options: {options}; "
    "Answer: {answer}; "
)
_POLL = 'Is it the right time to output "{text}"? You can only answer yes or no.'
_CUE = (
    "You are an advanced image question-answering AI assistant. You have been provided with images and a question "
    "related to the images. Your task is to carefully analyze the images and provide the answer to the question. You "
    "need to carefully confirm whether the images content meet the conditions of the question, and then output the "
    "correct content.\n\nQuestion: {question}\n\nThe answer is:"
)


def exam(annotations: pathlib.Path, protocol: str, context: float = CONTEXT) -> Exam:
    """The exam of an annotation file, whichever of the four it is.

    Args:
        protocol: a key of `PROTOCOLS`.
        context: seconds before a question that are seen; 0 for all.

    Raises:
        DialogueError: a question lacks what is to be asked.
    """
    content = list_of({"videos": read_json(annotations)}, "videos", str(annotations))
    questions = {}
    for name, entry, question, before, where in _walk(content, str(annotations)):
        time = _time(question, "time_stamp", where)
        if "ground_truth_output" in question:
            begin = _on_cue(question, time, protocol, context, where)
        else:
            begin = _choice(question, before, time, context, where)
        questions[name] = Question(text_of(entry, "video_path", where), begin)
    seen = f"{context:g} s" if context else "whole video"
    rules = {what: rule.format(context=seen) for what, rule in PROTOCOLS[protocol].items()}
    return Exam(questions, rules, lambda answers: _predictions(content, answers, str(annotations)))


_Place = tuple[str, dict[str, Any], dict[str, Any], list[dict[str, Any]] | None, str]


def _walk(content: Sequence[Any], place: str) -> Iterator[_Place]:
    """Every question: its name, its entry, itself, those before it where they count, and where it stands."""
    for number, item in enumerate(content):
        before: list[dict[str, Any]] = []
        for part, one in enumerate(item if isinstance(item, list) else [item]):
            where = f"{place}, record {number}" + (f".{part}" if isinstance(item, list) else "")
            entry = object_of(one, where)
            for index, question in enumerate(list_of(entry, "questions", where)):
                question = object_of(question, where)
                yield f"{number}.{part}.{index}", entry, question, before if isinstance(item, list) else None, where
                before = [*before, question]


def _predictions(content: list[Any], answers: Mapping[str, Any], place: str) -> list[Any]:
    content = copy.deepcopy(content)
    for name, _, question, _, _ in _walk(content, place):
        question[MODEL] = answers.get(name)
    return content


def _time(question: Mapping[str, Any], key: str, where: str) -> int:
    found = seconds(text_of(question, key, where))
    if not math.isfinite(found):
        raise DialogueError(f"{where}: expected a time such as 0:03:10 under {key!r}, found {question[key]!r:.80}")
    return int(found)


def _lettered(question: Mapping[str, Any], where: str) -> list[str]:
    options = [str(option) for option in list_of(question, "options", where)]
    has_letters = bool(options) and options[0].startswith("A.")
    return options if has_letters else [f"{chr(ord('A') + i)}. {option}" for i, option in enumerate(options[:26])]


def _choice(
    question: Mapping[str, Any], before: list[dict[str, Any]] | None, time: int, context: float, where: str
) -> Callable[[], Asking]:
    told = "".join(
        _BEFORE.format(
            time=text_of(earlier, "time_stamp", where),
            question=text_of(earlier, "question", where),
            options=", ".join(_lettered(earlier, where)),
            answer=text_of(earlier, "answer", where),
        )
        for earlier in before or []
    )
    prompt = (_CHOICE if before is None else _SQA).format(
        question=text_of(question, "question", where),
        options="\n".join(_lettered(question, where)),
        context=_CONTEXT + told if told else "",
    )
    start = max(0.0, time - context) if context else 0.0

    def choose() -> Asking:
        said = yield Watch(prompt, "A", start=start, until=time, forced=True)
        return said[0].text if said else None

    return choose


def _on_cue(question: Mapping[str, Any], time: int, protocol: str, context: float, where: str) -> Callable[[], Asking]:
    told, text = text_of(question, "question", where), text_of(question, "ground_truth_output", where)
    end = _time(question, "ground_truth_time_stamp", where) + LATE
    if protocol == "official":
        return lambda: _poll(told, f"{told} {_POLL.format(text=text)}", time, end)
    return lambda: _speak(told, time, end, max(0.0, time - context) if context else 0.0)


def _speak(told: str, time: int, end: int, start: float) -> Asking:
    said = yield Watch(told, "Yes", at=time, start=start, until=end)
    history = [_turn("user", told, time)]
    if not said:
        return {"answered": False, "dialog_history": []}
    second = int(said[0].time) + 1
    return {"answered": second, "dialog_history": [*history, _turn("assistant", said[0].text, second)]}


def _poll(told: str, query: str, time: int, end: int) -> Asking:
    history: list[dict[str, Any]] = []
    for now in range(time + 1, end + 1):
        for asked in (query, told):
            said = yield Watch(_CUE.format(question=asked), "Yes", start=time, until=now, forced=True)
            reply = said[0].text if said else ""
            history += [_turn("user", asked, now), _turn("assistant", reply, now)]
            if asked is told:
                return {"answered": now, "dialog_history": history}
            if "yes" not in reply.lower():
                break
    return {"answered": False, "dialog_history": history}


def _turn(role: str, content: str, time: int) -> dict[str, Any]:
    return {"role": role, "content": content, "time": time}
