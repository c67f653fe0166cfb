"""Dialogues about a world: what a user may ask and what should be said when.

Schema times are one more than frames: a query at time t belongs to frame t − 1. An event counts as over from its end
frame on, and the reply to it belongs to that frame. No two replies of a dialogue fall into one frame, and no question
is asked while an event that its answer depends on is in progress.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jstream.data.dialogue import Dialogue, Query, Response
from jstream.data.world.scene import Event, World, weighted

NARRATION = (
    "Narrate what happens.",
    "Tell me what happens.",
    "Say what happens in the video.",
    "Narrate the video.",
    "Tell me each thing that happens.",
)
EVENT_CAPTION = (
    "Describe each event when it is over.",
    "Describe every event as soon as it is over.",
    "Caption each event when it ends.",
    "Caption every event.",
    "When an event is over, describe it.",
)
ACTION_CAPTION = (
    "What does the {} do?",
    "Tell me what the {} does.",
    "Describe what the {} does.",
    "Caption each action of the {}.",
    "Watch the {} and describe its actions.",
)
FORWARD = (
    "Tell me when the {name} {does}.",
    "Let me know when the {name} {does}.",
    "Say when the {name} {does}.",
    "Watch until the {name} {does}.",
    "When will the {name} {do}?",
)
BACKWARD = (
    "When did the {name} {do}?",
    "At what time did the {name} {do}?",
    "From when to when did the {name} {do}?",
    "In which seconds did the {name} {do}?",
)
COLOUR_NOW = (
    "What colour is the {} now?",
    "What is the colour of the {} now?",
    "Tell me the colour of the {}.",
    "Which colour does the {} have now?",
)
COUNT = (
    "How many {} so far?",
    "How many {} have you seen so far?",
    "Count the {}.",
    "Tell me how many {} there are so far.",
)
OBJECTS_NOW = (
    "How many objects are there now?",
    "How many objects do you see now?",
    "Count the objects.",
    "Tell me how many objects there are now.",
)
WHERE_NOW = (
    "Where is the {} now?",
    "Where do you see the {} now?",
    "Tell me where the {} is now.",
    "What is the place of the {} now?",
)
WHERE_AGO = (
    "Where was the {} {} seconds ago?",
    "Where did you see the {} {} seconds ago?",
    "Tell me where the {} was {} seconds ago.",
    "What was the place of the {} {} seconds ago?",
)
NUM_QUERIES = (1, 2, 3, 3, 4, 4, 4)  # asked for in a dialogue of grounding or of questions about time
COUNTED = {"jump": "jumps", "spin": "spins", "collide": "collisions"}
CELLS = (
    ("Top left.", "Top.", "Top right."),
    ("Left.", "Centre.", "Right."),
    ("Bottom left.", "Bottom.", "Bottom right."),
)
CELL_MARGIN = 0.04  # a place nearer to the border of its cell is not asked for

Rng = np.random.Generator


def _pick(rng: Rng, options: Sequence):
    return options[int(rng.random() * len(options))]


def _between(rng: Rng, low: int, high: int) -> int:
    """A whole number from low to high, both included."""
    return low + int(rng.random() * (high - low + 1))


def _in_progress(events: Sequence[Event], frame: int) -> bool:
    return any(e.start_frame <= frame < e.end_frame for e in events)


# ------------------------------------------------------------------------------------------- narration and captions


def _first_frame(world: World, rng: Rng, events: Sequence[Event]) -> int | None:
    """When to ask: mostly at once, sometimes later, but before the last event ends."""
    last = max((e.end_frame for e in events), default=0)
    if last == 0:
        return None
    return 0 if rng.random() < 0.7 else _between(rng, 1, max(1, min(last - 1, world.duration // 2)))


def _spans(events: Sequence[Event], frame: int, text: Callable[[Event], str]) -> list[Response]:
    """One reply with its span for each event that ends after the query; one in progress starts with the query."""
    later = [e for e in events if e.end_frame > frame]
    return [Response(text(e), start=max(e.start, frame + 1), end=e.end) for e in later]


def narration(world: World, rng: Rng):
    frame = _first_frame(world, rng, world.events)
    if frame is None:
        return None
    later = [e for e in world.events if e.end_frame > frame]
    return [Query(_pick(rng, NARRATION), frame + 1)], [Response(e.sentence, time=e.end + 1) for e in later]


def event_caption(world: World, rng: Rng):
    frame = _first_frame(world, rng, world.events)
    if frame is None:
        return None
    return [Query(_pick(rng, EVENT_CAPTION), frame + 1)], _spans(world.events, frame, lambda e: e.sentence)


def action_caption(world: World, rng: Rng):
    """About one object that never changes its name, with two events or more where there is one."""
    actors = [[world.events[n] for n in thing.events] for thing in world.objects]
    actors = [events for events in actors if events and all(e.verb != "colour" for e in events)]
    actors = [events for events in actors if len(events) > 1] or actors
    if not actors:
        return None
    events = _pick(rng, actors)
    frame = _first_frame(world, rng, events)
    if frame is None:
        return None
    query = Query(_pick(rng, ACTION_CAPTION).format(events[0].name), frame + 1)
    return [query], _spans(events, frame, lambda e: e.action)


# ------------------------------------------------------------------------------------------- grounding


def _same(world: World, event: Event) -> list[Event]:
    """The events that a question about `event` would match, itself among them."""
    return [e for e in world.events if (e.name, e.does) == (event.name, event.does)]


def _when(event: Event) -> str:
    return f"From {event.start}s to {event.end}s."


def forward_grounding(world: World, rng: Rng):
    """Queries one after another; each is answered before the next is asked."""
    queries, responses = [], []
    wanted, free = _pick(rng, NUM_QUERIES), 0  # the first frame at which one may ask
    while len(queries) < wanted:
        later = [e for e in sorted(world.events, key=lambda e: e.start_frame) if e.start_frame > free]
        if not later:
            break
        event = _pick(rng, later[:2])
        frame = _between(rng, free, event.start_frame - 1)
        if sum(e.end_frame > frame for e in _same(world, event)) == 1:
            text = _pick(rng, FORWARD).format(name=event.name, does=event.does, do=event.do)
            queries.append(Query(text, frame + 1))
            responses.append(Response(_when(event), start=event.start, end=event.end))
        free = event.end_frame + 1
    return queries, responses


def _backward(world: World, rng: Rng, events: Sequence[Event], taken: set[int]) -> tuple[list[Query], list[Response]]:
    """A question about each of some events, at a frame after it that nothing else is said in; none without one."""
    queries, responses = [], []
    for event in events:
        frame = _between(rng, min(event.end_frame + 1, world.duration - 1), world.duration - 1)
        begun = [e for e in _same(world, event) if e.start_frame <= frame]
        if frame > event.end_frame and len(begun) == 1 and frame not in taken:
            taken.add(frame)
            queries.append(Query(_pick(rng, BACKWARD).format(name=event.name, do=event.do), frame + 1))
            responses.append(Response(_when(event), time=frame + 1))
    return queries, responses


def backward_grounding(world: World, rng: Rng):
    """Queries at any time after their events, each answered at once."""
    numbers = rng.permutation(len(world.events))[: _pick(rng, NUM_QUERIES)]
    return _backward(world, rng, [world.events[number] for number in numbers], set())


# ------------------------------------------------------------------------------------------- questions about time


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its answer now and at every later change: `answers` holds (frame, text), in order."""

    text: str
    answers: tuple[tuple[int, str], ...]


def _only_ones(world: World) -> list[int]:
    """The objects that are the only ones of their kind in the whole video: "the star" will do."""
    kinds = [thing.kind for thing in world.objects]
    return [i for i, kind in enumerate(kinds) if kinds.count(kind) == 1]


def _at_rest(world: World, index: int, frame: int) -> bool:
    """Whether an object is there and neither acts nor has someone act upon it."""
    thing = world.objects[index]
    inside = thing.born <= frame - 1 and frame + 1 < thing.gone  # a frame to spare: LEAD runs up to 0.9 s ahead
    around = [e for e in world.events if index in (e.subject, e.partner)]
    return inside and not any(e.start_frame - 1 <= frame <= e.end_frame for e in around)


def _place(world: World, index: int) -> str | None:
    """The cell of a 3 × 3 grid where an object rests; None near a border."""
    cells = []
    for c in world.objects[index].home:
        if min(abs(c - 1 / 3), abs(c - 2 / 3)) < CELL_MARGIN:
            return None
        cells.append(int(3 * c))
    return CELLS[cells[1]][cells[0]]


def colour_now(world: World, rng: Rng, frame: int) -> Question | None:
    options = []
    for index in _only_ones(world):
        thing = world.objects[index]
        changes = [world.events[n] for n in thing.events if world.events[n].verb == "colour"]
        if thing.born <= frame - 1 and frame + 1 < thing.gone and not _in_progress(changes, frame):
            answers = [(frame, world.colour_at(index, frame))]
            answers += [(e.end_frame, e.after) for e in changes if e.end_frame > frame]
            options.append((thing.kind, tuple((f, f"{colour.capitalize()}.") for f, colour in answers)))
    if not options:
        return None
    kind, answers = _pick(rng, options)
    return Question(_pick(rng, COLOUR_NOW).format(kind), answers)


def _counting(text: str, count: int, frame: int, steps: Sequence[tuple[Event, int]]) -> Question | None:
    """A question whose answer goes by a step at the end of each of these events."""
    if _in_progress([e for e, _ in steps], frame):
        return None
    count += sum(step for e, step in steps if e.end_frame <= frame)
    answers = [(frame, f"{count}.")]
    for event, step in sorted(steps, key=lambda s: s[0].end_frame):
        if event.end_frame > frame:
            count += step
            answers.append((event.end_frame, f"{count}."))
    return Question(text, tuple(answers))


def count_so_far(world: World, rng: Rng, frame: int) -> Question | None:
    """Counts the events of a verb that are over."""
    verb = _pick(rng, tuple(COUNTED))
    events = [(e, 1) for e in world.events if e.verb == verb]
    return _counting(_pick(rng, COUNT).format(COUNTED[verb]), 0, frame, events)


def objects_now(world: World, rng: Rng, frame: int) -> Question | None:
    """Counts the objects that stay: one that enters from the end of its event on, one that leaves up to the end of its
    event, one that only crosses never. Not asked while one crosses."""
    if _in_progress([e for e in world.events if e.verb == "cross"], frame):
        return None
    steps = [(e, 1 if e.verb == "enter" else -1) for e in world.events if e.verb in ("enter", "leave")]
    at_first = sum(thing.born < 0 for thing in world.objects)
    return _counting(_pick(rng, OBJECTS_NOW), at_first, frame, steps)


def where_now(world: World, rng: Rng, frame: int) -> Question | None:
    resting = [(i, _place(world, i)) for i in _only_ones(world) if _at_rest(world, i, frame)]
    options = [(i, place) for i, place in resting if place is not None]
    if not options:
        return None
    index, place = _pick(rng, options)
    return Question(_pick(rng, WHERE_NOW).format(world.objects[index].kind), ((frame, place),))


def where_ago(world: World, rng: Rng, frame: int) -> Question | None:
    """Where an object rested 3 to 8 seconds ago; it may be elsewhere or gone by now."""
    ago = _between(rng, 3, 8)
    resting = [(i, _place(world, i)) for i in _only_ones(world) if ago <= frame and _at_rest(world, i, frame - ago)]
    options = [(i, place) for i, place in resting if place is not None]
    if not options:
        return None
    index, place = _pick(rng, options)
    return Question(_pick(rng, WHERE_AGO).format(world.objects[index].kind, ago), ((frame, place),))


CHANGING = (colour_now, colour_now, count_so_far, objects_now)
ONE_OFF = (where_now, where_ago, where_ago, colour_now, count_so_far, objects_now)


def _one_offs(world: World, rng: Rng, wanted: int, taken: set[int]) -> list[Question]:
    """Up to `wanted` questions that are answered once, in frames that nothing else is said in."""
    questions = []
    for _ in range(6 * wanted):
        frame = _between(rng, 1, world.duration - 1)
        question = None if frame in taken else _pick(rng, ONE_OFF)(world, rng, frame)
        if question is not None and len(question.answers) == 1 and len(questions) < wanted:
            questions.append(question)
            taken.add(frame)
    return questions


def _said(questions: Sequence[Question]) -> tuple[list[Query], list[Response]]:
    queries = [Query(q.text, q.answers[0][0] + 1) for q in questions]
    return queries, [Response(text, time=frame + 1) for q in questions for frame, text in q.answers]


def _changing(world: World, rng: Rng) -> list[Question]:
    """A question from the first third of the video, whose answer changes where one can be found; none at worst."""
    question = None
    for _ in range(8):
        frame = _between(rng, 0, world.duration // 3)
        question = _pick(rng, CHANGING)(world, rng, frame)
        if question is not None and len(question.answers) > 1:
            break
    return [] if question is None else [question]


def tsqa(world: World, rng: Rng):
    """At most one question whose answer changes, kept up to date, and others that are answered once."""
    wanted = _pick(rng, NUM_QUERIES)
    questions = _changing(world, rng)
    taken = {frame for q in questions for frame, _ in q.answers}
    return _said(questions + _one_offs(world, rng, wanted - len(questions), taken))


def mixed(world: World, rng: Rng):
    """Narration from the start, with one or two questions in between."""
    if not world.events:
        return None
    questions = _one_offs(world, rng, _between(rng, 1, 2), {0, *(e.end_frame for e in world.events)})
    if not questions:
        return None
    queries, responses = _said(questions)
    told = [Response(e.sentence, time=e.end + 1) for e in world.events]
    return [Query(_pick(rng, NARRATION), 1), *queries], told + responses


# ------------------------------------------------------------------------------------------- lessons


def _asked(world: World, rng: Rng, wanted: int, questions: list[Question]):
    """Some questions, and others of every kind up to `wanted` in all, each in a frame of its own."""
    taken = {frame for q in questions for frame, _ in q.answers}
    events = [_pick(rng, world.events) for _ in range(wanted)] if world.events else []  # about half find a frame
    queries, responses = _backward(world, rng, events, taken)
    more, answers = _said(questions + _one_offs(world, rng, wanted - len(queries), taken))
    return queries + more, responses + answers


def quiz(world: World, rng: Rng):
    """As many questions as a teacher would ask and no user: about every third frame one, of all that is asked above.

    A frame costs far more than a question, so this is where looking things up in the past is learned.
    """
    return _asked(world, rng, max(1, int(world.duration * (0.15 + 0.35 * rng.random()))), _changing(world, rng))


def drill(world: World, rng: Rng):
    """A question in every frame that has one, each answered once."""
    return _asked(world, rng, world.duration, [])


def recall(world: World, rng: Rng):
    """When each event was, asked once at any time after it: no answer can be copied from an earlier one."""
    return _backward(world, rng, [world.events[number] for number in rng.permutation(len(world.events))], set())


# ------------------------------------------------------------------------------------------- the table of tasks

TASKS: dict[str, Callable] = {
    task.__name__: task
    for task in (narration, event_caption, action_caption, forward_grounding, backward_grounding, tsqa, mixed)
}

LESSONS: dict[str, Callable] = {"quiz": quiz, "drill": drill, "recall": recall}  # for training alone

# With these, Silence : Standby : Response over many dialogues is about 12 : 3 : 2.
DEFAULT_WEIGHTS = {
    "narration": 1.2,
    "event_caption": 6.5,
    "action_caption": 1.0,
    "forward_grounding": 2.5,
    "backward_grounding": 0.8,
    "tsqa": 2.0,
    "mixed": 1.2,
}


def make_dialogue(world: World, task: str, rng: Rng, video: str = "") -> Dialogue | None:
    """A dialogue about a world.

    Args:
        world: what the video shows.
        task: a key of `TASKS` or `LESSONS`.
        rng: draws the moments and the words.
        video: path of the video, for the record.

    Returns:
        The dialogue, or None where the world offers nothing for the task.

    Raises:
        ValueError: for an unknown task.
    """
    if task not in TASKS | LESSONS:
        raise ValueError(f"expected a task among {', '.join(TASKS | LESSONS)}, found {task!r}")
    queries, responses = (TASKS | LESSONS)[task](world, rng) or ((), ())
    if not queries:
        return None
    return Dialogue(
        video=video,
        queries=tuple(sorted(queries, key=lambda q: q.time)),
        responses=tuple(sorted(responses, key=lambda response: response.given)),
        task=task,
        source="world",
        duration=float(world.duration),
    )


def sample_dialogue(
    world: World, rng: Rng, weights: Mapping[str, float] = DEFAULT_WEIGHTS, video: str = ""
) -> Dialogue | None:
    """A dialogue of a task drawn by weight, of another where the world offers nothing for it; None where none fits."""
    left = {task: weight for task, weight in weights.items() if weight > 0}
    while left:
        task = weighted(rng, left)
        dialogue = make_dialogue(world, task, rng, video)
        if dialogue is not None:
            return dialogue
        del left[task]
    return None
