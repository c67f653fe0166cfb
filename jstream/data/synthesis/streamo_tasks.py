"""Streamo's five tasks as dialogues (arXiv 2512.21334, the annotation pipeline).

narration           a VLM tells what happens between adjacent pictures, a second apart; an LLM cleans, and may reject
captions            of events and of actions: a VLM captions each segment, then finds the caption in the video again
                    without being told where; only spans that agree are kept
grounding           captions rewritten as queries, for what is still to come or is over
time-sensitive QA   a question whose answer changes, with the answer at each change

A part that cannot be used is left out, and its reason stands beside what was made.
"""

import math
import random

from jstream.data.dialogue import Dialogue, Query, Response, interval_iou
from jstream.data.synthesis import prompts
from jstream.data.synthesis.asking import Ask, Dropped, Prompt, as_many, numbered, one_line, some
from jstream.data.synthesis.source import AnnotatedVideo, Looks, Segment, evenly, pictures

IOU = 0.5  # of an annotated span and of the one found for its caption, at least
MAX_POINTS = 40  # changes that a question goes through
_CAPTION_PICTURES, _GROUND_PICTURES = 8, 48
_LEAST_CONTEXT = 15.0  # seconds around an event that its caption is looked for in, on both sides together

Made = tuple[list[Dialogue], list[str]]  # and why parts were left out


def narration(source: AnnotatedVideo, ask: Ask, rng: random.Random, looks: Looks) -> Made:
    """What happens, second for second; needs no segments.

    Raises:
        Dropped: the video cannot be read, or nothing is left to tell.
    """
    seen = pictures(source, looks)
    told, reasons = [], []  # (second of the later picture, what happens)
    for second in range(1, len(seen)):
        pair = [("First:", seen[second - 1]), ("Second:", seen[second])]
        try:
            change = one_line(ask(prompts.PAIR, pair)["change"])
        except Dropped as why:
            reasons.append(f"second {second}: {why}")
            continue
        if change:
            told.append((second, change))
    lines = ask.lines(prompts.CLEAN, [text for _, text in told])
    responses = [Response(line, time=second + 1) for (second, _), line in zip(told, lines, strict=True) if line]
    if not responses:
        raise Dropped(reasons[0] if reasons and not told else "nothing that happens was left after cleaning")
    return [_dialogue(source, rng.choice(prompts.NARRATE), 1, responses, "narration")], reasons


def captions(source: AnnotatedVideo, ask: Ask, rng: random.Random, looks: Looks, iou: float = IOU) -> Made:
    """Captions of events, and of actions, each given when its segment is over: up to two dialogues.

    Raises:
        Dropped: the video cannot be read.
    """
    _some_segments(source)
    seen = pictures(source, looks)
    made, reasons = [], []
    tasks = (
        ("event_caption", prompts.EVENT_CAPTION, prompts.CAPTION_EVENTS),
        ("action_caption", prompts.ACTION_CAPTION, prompts.CAPTION_ACTIONS),
    )
    for task, prompt, queries in tasks:
        responses = []
        for segment in source.segments:
            try:
                start, end = _span(segment, len(seen))
                caption = _consistent_caption(prompt, segment.text, start, end, seen, ask, rng, iou)
                responses.append(Response(caption, start=start, end=end))
            except Dropped as why:
                reasons.append(f"{task}, {segment.start:g} to {segment.end:g} s: {why}")
        if responses:
            made.append(_dialogue(source, rng.choice(queries), 1, responses, task))
    return made, reasons


def grounding(source: AnnotatedVideo, ask: Ask, rng: random.Random) -> Made:
    """A query for the time of each event, before it or after it: a dialogue for each. Nothing is looked at.

    Raises:
        Dropped: no segments.
    """
    _some_segments(source)
    made, reasons = [], []
    texts = [segment.text for segment in source.segments]
    last = math.floor(source.end)
    for number, segment in enumerate(source.segments):
        try:
            if texts.count(segment.text) > 1:
                raise Dropped("another event has the same caption")
            start, end = _span(segment, last)
            before, after = math.ceil(start) - 1, math.floor(end) + 1  # the last turn before it, the first behind it
            forward = before >= 1 and (after > last or rng.random() < 0.5)
            if not forward and after > last:
                raise Dropped("it takes up the whole video")
            query = ask(
                prompts.AS_QUERY,
                check=some("query"),
                asked=prompts.FORWARD if forward else prompts.BACKWARD,
                lines=numbered(texts),
                number=number + 1,
            )
            if not query["fits_only_this"]:
                raise Dropped(f"the query fits other events as well: {query['query']!r:.120}")
            time = rng.randint(1, before) if forward else rng.randint(after, last)
            when = prompts.GROUNDED.format(start, end)
            response = Response(when, start=start, end=end) if forward else Response(when, time=time)
            task = "forward_grounding" if forward else "backward_grounding"
            made.append(_dialogue(source, one_line(query["query"]), time, [response], task))
        except Dropped as why:
            reasons.append(f"{segment.start:g} to {segment.end:g} s: {why}")
    return made, reasons


def time_sensitive_qa(source: AnnotatedVideo, ask: Ask, rng: random.Random) -> Made:
    """A question asked before its answer last changes, answered at once where it can be and at every change after.

    Answers come where segments end: what a segment tells is true by then.

    Raises:
        Dropped: no segments, or no answer that changes.
    """
    _some_segments(source)
    segments = sorted(source.segments, key=lambda segment: segment.end)[:MAX_POINTS]
    found = ask(
        prompts.CHANGING_QUESTION,
        check=lambda found: as_many(len(segments), "answers")(found) or some("question")(found),
        lines=numbered([segment.text for segment in segments]),
        number=len(segments),
    )
    known: list[tuple[int, str]] = []  # time of a turn, and the answer from then on
    for segment, answer in zip(segments, found["answers"], strict=True):
        time, text = max(1, math.ceil(segment.end)), one_line(answer)
        if known and known[-1][0] == time:  # what is true when the turn is over
            known.pop()
        if text and (not known or known[-1][1] != text):
            known.append((time, text))
    if len(known) < 2:
        raise Dropped(f"expected an answer that changes, found {len(known)} for {found['question']!r:.120}")
    asked = rng.randint(1, known[-1][0] - 1)
    at_once = [(asked, text) for time, text in known if time <= asked][-1:]
    responses = [Response(text, time=time) for time, text in [*at_once, *(a for a in known if a[0] > asked)]]
    return [_dialogue(source, one_line(found["question"]), asked, responses, "tsqa")], []


# ------------------------------------------------------------------------------------------------- spans and captions


def _some_segments(source: AnnotatedVideo) -> None:
    if not source.segments:
        raise Dropped("expected annotated segments, found none")


def _span(segment: Segment, last: int) -> tuple[float, float]:
    """Its times, with a turn behind it to answer in.

    Args:
        last: time of the video's last turn.
    """
    start, end = max(1.0, segment.start), min(segment.end, last - 1.0)
    if start > end:
        raise Dropped(f"it lies behind {last:g} s, where the video ends or is cut")
    return start, end


def _consistent_caption(
    prompt: Prompt, hint: str, start: float, end: float, seen: list[bytes], ask: Ask, rng: random.Random, least: float
) -> str:
    first, last = math.ceil(start) - 1, math.ceil(end) - 1
    shown = [(f"{n}:", seen[i]) for n, i in enumerate(evenly(first, last, _CAPTION_PICTURES), start=1)]
    caption = one_line(ask(prompt, shown, some("caption"), hint=one_line(hint))["caption"])
    # The event lies anywhere in what is shown, so that its place gives nothing away.
    context = max(2 * (last - first + 1), _LEAST_CONTEXT)
    begin = max(0, first - round(rng.random() * context))
    until = min(len(seen) - 1, begin + last - first + round(context))
    shown = [(f"Second {i}:", seen[i]) for i in evenly(begin, until, _GROUND_PICTURES)]
    found = ask(prompts.GROUND, shown, caption=caption)
    overlap = interval_iou((start - 1, end), (found["start"], found["end"])) if found["found"] else 0.0
    if overlap < least:
        where = f"{found['start']:g} to {found['end']:g} s" if found["found"] else "nowhere"
        raise Dropped(f"its caption was found at {where}, IoU {overlap:.2f}, expected {least:g}: {caption!r:.120}")
    return caption


def _dialogue(source: AnnotatedVideo, query: str, time: int, responses: list[Response], task: str) -> Dialogue:
    ordered = sorted(responses, key=lambda response: response.given)
    queries = (Query(query, float(time)),)
    return Dialogue(source.name, queries, tuple(ordered), task, source.source, source.duration)
