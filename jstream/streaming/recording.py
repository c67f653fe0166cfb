"""What a watched stream leaves behind: `events.jsonl`, `captions.vtt` and `timeline.png` in one output folder.

`Recording` writes the events as they happen and gives the three files their names when the stream has ended well.
`captions` and `timeline` stand by themselves, for whoever has events and wants WebVTT or a picture. Nothing here
decides when to speak or reads what a reply says.
"""

import collections
import functools
import itertools
import math
import pathlib
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MultipleLocator
from matplotlib.transforms import Affine2D, Transform

from jstream.streaming.event import Asked, Event


class Recording:
    """Keeps the events of one stream and writes its three files; a context manager.

    While the stream runs, every event is a line of `events.jsonl.partial`, flushed as it happens. At the end of the
    block all three files get their names. If the block raises, they do not appear and what was begun is removed; files
    of an earlier run in the same folder stay as they were. To keep a live stream that is stopped with Ctrl-C, catch
    KeyboardInterrupt inside the block.

    Args:
        out_dir: the folder; made where missing.
        queries: what was asked, for the picture. `recording.queries` is a list that may grow while the stream runs.
        title: heads the picture.
    """

    NAMES = ("events.jsonl", "captions.vtt", "timeline.png")

    def __init__(self, out_dir: str | pathlib.Path, queries: Iterable[Asked] = (), title: str = ""):
        self.out_dir = pathlib.Path(out_dir)
        self.queries = list(queries)
        self.title = title
        self.events: list[Event] = []
        self._lines = None

    def __enter__(self) -> "Recording":
        self.out_dir.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which UTF-8 cannot hold, becomes \udxxx: that is also how JSON writes it.
        self._lines = self._partial("events.jsonl").open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def add(self, event: Event) -> None:
        """Appends one event to the file; call it once for every frame seen, in order."""
        if self._lines is None:
            raise RuntimeError("expected an open recording, found a closed one: add events inside `with Recording(…)`")
        self._lines.write(event.to_json() + "\n")
        self._lines.flush()
        self.events.append(event)

    def __exit__(self, error_type, error, traceback) -> None:
        assert self._lines is not None
        try:
            self._lines.close()
            if error_type is None:
                vtt = captions(self.events)
                self._partial("captions.vtt").write_text(vtt, encoding="utf-8", errors="replace", newline="\n")
                timeline(self.events, self.queries, self.title).savefig(self._partial("timeline.png"), format="png")
                for name in self.NAMES:
                    self._partial(name).replace(self.out_dir / name)
        finally:
            self._lines = None
            for name in self.NAMES:
                self._partial(name).unlink(missing_ok=True)

    def _partial(self, name: str) -> pathlib.Path:
        return self.out_dir / (name + ".partial")


# --------------------------------------------------------------------------------------------------------------- WebVTT

READING_SPEED = 15.0  # characters a second, a common guideline for subtitles
SHORTEST_CAPTION, LONGEST_CAPTION = 2.0, 20.0  # seconds


def captions(events: Iterable[Event]) -> str:
    """The replies as WebVTT: each from its event's time until it is read or the next reply comes.

    Args:
        events: of one stream, in any order; those without text are passed over.

    Returns:
        The text of a `.vtt` file, valid also where nothing was said. Source: W3C WebVTT, section 4.
    """
    spoken = sorted((event for event in events if event.text), key=lambda event: event.time)
    replies = [(max(0, round(1000 * event.time)), _cue_text(event.text or "")) for event in spoken]
    replies = [(time, text) for time, text in replies if text]  # time in milliseconds
    blocks = ["WEBVTT"]
    for number, (time, text) in enumerate(replies, start=1):
        shown = min(max(SHORTEST_CAPTION, len(text) / READING_SPEED), LONGEST_CAPTION)
        read = time + round(1000 * shown)
        end = min(read, next((later for later, _ in itertools.islice(replies, number, None) if later > time), read))
        blocks.append(f"{number}\n{_timestamp(time)} --> {_timestamp(end)}\n{_escape(text)}")
    return "\n\n".join(blocks) + "\n"


def _cue_text(text: str) -> str:
    """Lines without blank ones among them, which would end the cue, and without control characters."""
    lines = (_without(("Cc", "Cs"), " ".join(line.split())).strip() for line in text.splitlines())
    return "\n".join(line for line in lines if line)


def _without(categories: tuple[str, ...], text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c) not in categories)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _timestamp(milliseconds: int) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{milliseconds:03d}"


# ---------------------------------------------------------------------------------------------------------- the picture

# Okabe and Ito's palette, which colour-blind eyes tell apart; the three also differ in lightness.
STATE_COLOURS = {"silence": "#D5DBE1", "standby": "#E69F00", "response": "#0072B2"}
OTHER_COLOUR = "#999999"  # a state this file does not know
QUERY_COLOUR = "#B23A6B"
INK, PALE_INK, QUERY_PAPER, REPLY_PAPER = "#20262D", "#6B7682", "#FBEFF4", "#EDF4FA"

DPI = 120
FONT_SIZE, TITLE_SIZE = 9.0, 13.0  # points
# All inches. The plots leave the right margin free: a label at the last frame fits there.
WIDTH, LEFT, RIGHT = 15.0, 0.75, 2.75
LABEL_WIDTH, LABEL_GAP, LABEL_PAD = 2.55, 0.09, 0.06
LABEL_LINES, LABEL_LINES_IN_A_CROWD = 5, 3
LABELS_HEIGHT = 4.8  # at most; where labels would stack higher, fewer are shown
LONGEST_TEXT = 1000  # characters; no label holds as many
LINE_HEIGHT = 1.32 * FONT_SIZE / 72
HEADER, DOTS, DOT, BAND, PROBS, AXIS, SPACE = 0.62, 0.42, 0.18, 0.34, 0.95, 0.5, 0.1
CJK_FONTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei", "Noto Sans", "Noto Emoji")


class Label(NamedTuple):
    """A text on the picture, like a flag on a pole at its time; inches from the left and the foot of the labels."""

    x: float
    y: float
    width: float
    height: float
    heading: str
    lines: list[str]
    is_query: bool


def timeline(events: Sequence[Event], queries: Sequence[Asked] = (), title: str = "") -> Figure:
    """Draws one stream over time: what was asked and said, the state at each frame, and the states' probabilities.

    Each reply is a dot with its text on a flag above it; where there are too many for the page, texts are left out
    evenly and the header counts them. A pale bar leads from `Event.start` to the reply where the model gave one. Where
    there are more frames than columns in the picture, a column shows the frame that was nearest to speaking.

    Args:
        events: of one stream, in order of time.
        queries: drawn as dashed lines through all the plots.
        title: heads the picture.

    Returns:
        A figure of its own (no pyplot state), to be saved with `savefig`.
    """
    figure = Figure(dpi=DPI)
    FigureCanvasAgg(figure)
    events, queries = sorted(events, key=lambda e: e.time), sorted(queries, key=lambda q: q.time)
    replies = [event for event in events if event.text]

    edges = _frame_edges([event.time for event in events])
    begin = min([e[0] for e in edges[:1]] + [q.time for q in queries] + [0.0 if not events else math.inf])
    end = max([e[1] for e in edges[-1:]] + [q.time for q in queries] + [begin + 1.0])
    span, inches = end - begin, WIDTH - LEFT - RIGHT

    labels, hidden = _place_labels(
        [(inches * (q.time - begin) / span, f"{_clock(q.time, end)}  asked", q.text, True) for q in queries]
        + [(inches * (e.time - begin) / span, _clock(e.time, end), e.text or "", False) for e in replies],
        _text_width,
    )
    labels_height = max([label.y + label.height for label in labels], default=0.0)

    height = HEADER + labels_height + DOTS + BAND + SPACE + PROBS + AXIS
    figure.set_size_inches(WIDTH, height)
    top = height - HEADER - labels_height

    def plot(foot: float, tall: float) -> Axes:
        axes = figure.add_axes((LEFT / WIDTH, foot / height, inches / WIDTH, tall / height))
        axes.set_xlim(begin, end)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize=FONT_SIZE, labelcolor=PALE_INK)
        axes.spines[:].set_visible(False)
        axes.set_facecolor("none")
        return axes

    probs = plot(AXIS, PROBS)
    band = plot(AXIS + PROBS + SPACE, BAND)
    dots = plot(top - DOTS, DOTS)
    states = _states_of(events)

    columns = _columns(events, edges, begin, span / (inches * DPI / 2))

    # the states over time
    for state in states:
        band.broken_barh([(a, b - a) for a, b, e in columns if e.state == state], (0, 1), color=_colour(state), lw=0)
    band.set_ylim(0, 1)

    # their probabilities, stacked, the response at the foot where its height reads directly
    if columns:
        times = [edge for a, b, _ in columns for edge in (a, b)]
        upwards = states[::-1]
        stacked = [[p for *_, e in columns for p in [e.probs.get(state, 0.0)] * 2] for state in upwards]
        probs.stackplot(times, stacked, colors=[_colour(state) for state in upwards], linewidth=0)
        probs.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    probs.set_ylim(0, 1)
    probs.xaxis.set_major_locator(MultipleLocator(_tick_step(span)))
    probs.xaxis.set_major_formatter(FuncFormatter(lambda time, _: _clock(time, end)))
    probs.tick_params(axis="x", length=4, color=PALE_INK, pad=4)

    # the moments something was said, and the spans the replies tell of
    blue, size = STATE_COLOURS["response"], min(6.0, max(2.0, 50 * inches / max(1, len(replies))))
    dots.set_ylim(0, DOTS)
    for event in replies:
        if event.start is not None and event.start < event.time:
            spoken_of = [max(event.start, begin), event.time]
            dots.plot(spoken_of, [DOT, DOT], color=blue, lw=4, alpha=0.3, solid_capstyle="butt")
    dots.plot([e.time for e in replies], [DOT] * len(replies), "o", color=blue, markersize=size, mew=0, clip_on=False)

    # the words
    _draw_labels(figure, labels, foot=top, dot=top - DOTS + DOT)
    for query in queries:
        x = LEFT + inches * (query.time - begin) / span
        _line(figure, [x, x], [AXIS, top - DOTS + DOT], QUERY_COLOUR, linestyle=(0, (3, 2)))

    counts = [(len(events), "frame", "frames"), (len(replies), "reply", "replies"), (len(queries), "query", "queries")]
    summary = [f"{n} {one if n == 1 else many}" for n, one, many in counts]
    summary += [f"+{hidden} more texts than fit here"] if hidden else []
    heading = _wrap(title, (WIDTH - 2 * LEFT) * FONT_SIZE / TITLE_SIZE, 1, _text_width) or ["What was seen and said"]
    _write(figure, LEFT, height - 0.27, heading[0], INK, size=TITLE_SIZE)
    _write(figure, LEFT, height - 0.47, "  ·  ".join(summary), PALE_INK)

    # the key to the colours
    key = LEFT + inches + 0.2
    for row, state in enumerate(states):
        foot = AXIS + PROBS + SPACE + BAND - 0.16 - 0.24 * row
        _box(figure, key, foot, 0.16, 0.16, _colour(state))
        _write(figure, key + 0.25, foot + 0.02, state, PALE_INK)
    return figure


def _states_of(events: Sequence[Event]) -> list[str]:
    found = {state for event in events for state in (event.state, *event.probs)}
    return [s for s in STATE_COLOURS if s in found] + sorted(found - set(STATE_COLOURS))


def _colour(state: str) -> str:
    return STATE_COLOURS.get(state, OTHER_COLOUR)


def _frame_edges(times: Sequence[float]) -> list[tuple[float, float]]:
    """From when to when each frame stood: until the next one, but a pause of the stream stays a gap."""
    steps = [b - a for a, b in zip(times, times[1:]) if b > a]
    usual = statistics.median(steps) if steps else 1.0
    return [(a, min(b, a + 3 * usual)) for a, b in zip(times, [*times[1:], times[-1] + usual if times else 0.0])]


def _columns(
    events: Sequence[Event], edges: Sequence[tuple[float, float]], begin: float, narrowest: float
) -> list[tuple[float, float, Event]]:
    """(from, to, event) of what is drawn: each frame, or the nearest to speaking of those closer than `narrowest`."""
    columns = []
    for _, group in itertools.groupby(zip(edges, events), lambda frame: int((frame[0][0] - begin) / narrowest)):
        frames = list(group)
        shown = max((event for _, event in frames), key=_nearness_to_speaking)
        columns.append((frames[0][0][0], frames[-1][0][1], shown))
    return columns


def _nearness_to_speaking(event: Event) -> tuple[bool, float]:
    return event.state == "response", event.probs.get("response", 0.0) + event.probs.get("standby", 0.0) / 2


def _clock(time: float, end: float) -> str:
    """`12.5 s` on an axis that ends within two minutes, `1:02` within an hour, `1:00:02` later."""
    if end < 120:
        return f"{round(time, 1):g} s"
    minutes, seconds = divmod(round(time), 60)
    return f"{minutes}:{seconds:02d}" if end < 3600 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _tick_step(span: float) -> float:
    steps = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200)
    return next((step for step in steps if span / step <= 16), span / 8)


# --------------------------------------------------------------------------------------------------------------- labels


def _place_labels(
    texts: Sequence[tuple[float, str, str, bool]], text_width: Callable[[str], float]
) -> tuple[list[Label], int]:
    """Chooses and places labels so that none overlaps another.

    A label stretches from its pole to the right. So going from the last to the first, each may rise above all those
    already placed that lie under it, and its own pole meets none of them. Where that gets too high, a label takes the
    lowest free place and its pole may pass behind others. Where that gets too high still, texts are cut shorter, and
    those nearer to the last shown of their kind than a distance are left out; the distance grows until the rest fits.

    Args:
        texts: (inches from the left, heading, text, is it a query) of each label.
        text_width: the width of a line in inches.

    Returns:
        The labels, and how many texts were left out.
    """
    texts = sorted(texts, key=lambda text: (text[0], not text[3]))
    calm = [(False, LABEL_LINES, 0.0), (True, LABEL_LINES, 0.0)]
    crowded = ((True, LABEL_LINES_IN_A_CROWD, 0.05 * step) for step in itertools.count())
    labels: list[Label] = []
    for behind, max_lines, distance in itertools.chain(calm, crowded):
        labels = []
        for x, heading, text, is_query in reversed(_spaced(texts, distance)):
            lines = _wrap(text, LABEL_WIDTH - 2 * LABEL_PAD, max_lines, text_width)
            width = 2 * LABEL_PAD + max(map(text_width, [heading, *lines]))
            height = 2 * LABEL_PAD + LINE_HEIGHT * (1 + len(lines))
            near = [(n.y - LABEL_GAP, n.y + n.height + LABEL_GAP) for n in labels if n.x < x + width + LABEL_GAP]
            tops = [0.0, *(top for _, top in near)]
            free = (y for y in sorted(tops) if all(y + height <= foot or y >= top for foot, top in near))
            labels.append(Label(x, next(free) if behind else max(tops), width, height, heading, lines, is_query))
        if max([label.y + label.height for label in labels], default=0.0) <= LABELS_HEIGHT:
            break
    return labels, len(texts) - len(labels)


def _spaced(texts: Sequence[tuple[float, str, str, bool]], distance: float) -> list[tuple[float, str, str, bool]]:
    """The texts a distance or more after the last one kept of their kind; queries, which are few, may come closer."""
    distances = {True: distance / 3, False: distance}
    last, kept = {True: -math.inf, False: -math.inf}, []
    for text in texts:
        x, *_, is_query = text
        if x - last[is_query] >= distances[is_query]:
            last[is_query] = x
            kept.append(text)
    return kept


def _wrap(text: str, width: float, max_lines: int, text_width: Callable[[str], float]) -> list[str]:
    """Breaks a text into lines of at most `width`, at spaces where it can; an ellipsis stands for what does not fit."""
    words = collections.deque(_drawable(text[:LONGEST_TEXT]).split())
    lines, line = [], ""
    while words and len(lines) < max_lines:
        word = words.popleft()
        joined = f"{line} {word}" if line else word
        if text_width(joined) <= width:
            line = joined
            continue
        words.appendleft(word)
        if not line:  # a word wider than a line is cut where it fits
            fits = next((n for n in range(1, len(word)) if text_width(word[: n + 1]) > width), len(word))
            line, words[0] = word[:fits], word[fits:]
        lines.append(line)
        line = ""
    lines += [line] if line else []
    if not words:
        return lines
    last = lines[-1]
    while last and text_width(last + " …") > width:
        last = last[:-1]
    return [*lines[:-1], last.rstrip() + " …"]


@functools.cache
def _font_families() -> list[str]:
    installed = set(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


@functools.cache
def _known_characters() -> set[int]:
    paths = [font_manager.findfont(font_manager.FontProperties(family=name)) for name in _font_families()]
    return {code for path in paths for code in font_manager.get_font(path).get_charmap()}


def _drawable(text: str) -> str:
    """The text on one line, with a box for each character that no font at hand can draw."""
    text = _without(("Cc", "Cf", "Cs"), " ".join(unicodedata.normalize("NFC", text).split()))
    return "".join(c if ord(c) in _known_characters() else "□" for c in text)


@functools.cache
def _renderer():
    return FigureCanvasAgg(Figure(dpi=DPI)).get_renderer()


@functools.lru_cache(maxsize=10_000)
def _text_width(text: str) -> float:
    font = font_manager.FontProperties(family=_font_families(), size=FONT_SIZE)
    return _renderer().get_text_width_height_descent(text, font, ismath=False)[0] / DPI


# --------------------------------------------------------------------------------------------------- drawing, in inches


def _draw_labels(figure: Figure, labels: Sequence[Label], foot: float, dot: float) -> None:
    """`foot` is where the labels begin and `dot` where their poles stand, above the foot of the figure."""
    colours = [QUERY_COLOUR if label.is_query else STATE_COLOURS["response"] for label in labels]
    for label, colour in zip(labels, colours):
        _line(figure, [LEFT + label.x] * 2, [dot, foot + label.y], colour, zorder=1)
    for label, colour in zip(labels, colours):
        x, y, top = LEFT + label.x, foot + label.y, foot + label.y + label.height
        _box(figure, x, y, label.width, label.height, QUERY_PAPER if label.is_query else REPLY_PAPER)
        _line(figure, [x, x], [y, top], colour, linewidth=2.2, zorder=3)
        for row, line in enumerate([label.heading, *label.lines]):
            _write(figure, x + LABEL_PAD, top - LABEL_PAD - LINE_HEIGHT * (row + 0.76), line, INK if row else colour)


def _inches(figure: Figure) -> Transform:
    """From inches; unlike `dpi_scale_trans` it goes with the axes where a notebook crops the figure."""
    width, height = figure.get_size_inches()
    return Affine2D().scale(1 / width, 1 / height) + figure.transFigure


def _write(figure: Figure, x: float, y: float, text: str, colour: str, size: float = FONT_SIZE) -> None:
    style = {"color": colour, "size": size, "family": _font_families(), "parse_math": False}
    figure.text(x, y, text, transform=_inches(figure), **style)


def _box(figure: Figure, x: float, y: float, width: float, height: float, colour: str) -> None:
    figure.add_artist(Rectangle((x, y), width, height, color=colour, lw=0, zorder=2, transform=_inches(figure)))


def _line(figure: Figure, x: list[float], y: list[float], colour: str, **style) -> None:
    figure.add_artist(Line2D(x, y, color=colour, transform=_inches(figure), **{"linewidth": 1.0, **style}))
