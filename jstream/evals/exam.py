"""`Exam`: the questions of a benchmark as streams to watch, whoever answers them.

A question is a generator: it yields each `Watch` that it wants a stream for, is sent what was said in it, and returns
its answer, plain JSON. `run_ovo.py` and `run_streamingbench.py` make exams, `runner.py` has a model sit them; nothing
here knows a model.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple


class Said(NamedTuple):
    """A reply, and the second of the video that its frame shows."""

    time: float
    text: str


@dataclasses.dataclass(frozen=True)
class Watch:
    """A stream of a video in which something is asked once.

    Attributes:
        ask: the question.
        guess: what one who always answers says.
        at: seconds; it is heard with the first frame from there on, or with the last frame, where none is as late.
        start: seconds of the video at which the stream begins; its own clock begins there at 0.
        until: seconds at which the stream ends, if the video is as long; a frame at this second is not seen.
        forced: whether it is answered at once and nothing is said otherwise. If not, the model decides from the
            question on; what it would have said before is not said.
        first: whether the stream ends with the first reply.
    """

    ask: str
    guess: str
    at: float = math.inf
    start: float = 0.0
    until: float = math.inf
    forced: bool = False
    first: bool = True


Asking = Generator[Watch, list[Said], Any]


class Question(NamedTuple):
    """A question about a video, as its annotations name it. `begin` may be called again, to ask it anew."""

    video: str
    begin: Callable[[], Asking]


@dataclasses.dataclass(frozen=True)
class Exam:
    """A benchmark under a protocol.

    Attributes:
        questions: by a name of their own, in the order of the annotations.
        rules: what each is about, and a sentence.
        predictions: the answers in the official form, which its scorer reads; a question without one, or with None for
            one, has no reply there.
    """

    questions: Mapping[str, Question]
    rules: Mapping[str, str]
    predictions: Callable[[Mapping[str, Any]], Any]


def always_silent(_: Watch) -> list[Said]:
    """Says nothing."""
    return []


def always_respond(watch: Watch) -> list[Said]:
    """Says the same to every question of a kind, as soon as it is asked."""
    return [Said(watch.start if math.isinf(watch.at) else watch.at, watch.guess)]


def answers_of(exam: Exam, says: Callable[[Watch], list[Said]]) -> dict[str, Any]:
    """The answers of one who need not see the videos."""
    found = {}
    for name, question in exam.questions.items():
        asking = question.begin()
        try:
            watch = next(asking)
            while True:
                watch = asking.send(says(watch))
        except StopIteration as end:
            found[name] = end.value
    return found
