"""What data are made from: a video with its annotated segments, and its pictures as a model is shown them.

Times are those of dialogues: a time names the *end* of a one-second turn, so that a segment from 5 to 7 is seen in the
pictures 4, 5 and 6, of which the first is at second 4.
"""

import dataclasses
import itertools
import math

from jstream.data.annotations import Annotation
from jstream.data.dialogue import Dialogue
from jstream.data.frames import to_jpeg
from jstream.data.synthesis.asking import Dropped
from jstream.data.video import VideoError, open_video


@dataclasses.dataclass(frozen=True)
class Segment:
    """Something that was annotated.

    Attributes:
        text: what happens.
        start, end: seconds, of turns; the same for a moment.
    """

    text: str
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class AnnotatedVideo:
    """A video with its segments, in order of their starts.

    Attributes:
        video: path of the file.
        name: the same, as what is made of it says it.
        duration: seconds, where known.
        source: the dataset it comes from.
    """

    video: str
    name: str
    segments: tuple[Segment, ...]
    duration: float | None = None
    source: str = ""

    @property
    def end(self) -> float:
        """The last time that is known of."""
        return self.duration or max((segment.end for segment in self.segments), default=0.0)


@dataclasses.dataclass(frozen=True)
class Looks:
    """How pictures are shown: one a second, JPEG.

    Attributes:
        max_seconds: of a video, from its beginning.
        max_pixels: of a picture; larger ones are scaled down.
        quality: of the JPEG.
    """

    max_seconds: int = 600
    max_pixels: int = 448 * 448
    quality: int = 85


def annotated_video(annotation: Annotation, name: str) -> AnnotatedVideo:
    """An annotation as a source: what is answered becomes what was annotated."""
    said = annotation.said
    if isinstance(said, Dialogue):
        spans = [(r.text, r.time, r.time) if r.end is None else (r.text, r.start, r.end) for r in said.responses]
    else:
        fps = annotation.fps or 1.0
        ends = [annotation.start + (i + 1) / fps for i in range(len(said))]
        spans = [(turn.reply, end, end) for turn, end in zip(said, ends) if turn.reply]
    last = annotation.duration or math.inf
    segments = [Segment(text, start, min(end, last)) for text, start, end in spans if start <= min(end, last)]  # type: ignore
    ordered = tuple(sorted(segments, key=lambda segment: (segment.start, segment.end)))
    return AnnotatedVideo(annotation.video, name, ordered, annotation.duration, getattr(said, "source", ""))


def pictures(source: AnnotatedVideo, looks: Looks) -> list[bytes]:
    """JPEG [F]: what is seen at second 0, 1, …

    Raises:
        Dropped: the video cannot be read.
    """
    try:
        with open_video(source.video, 1.0) as video:
            seen = itertools.islice(video, looks.max_seconds)
            return [to_jpeg(frame.image, looks.max_pixels, looks.quality) for frame in seen]
    except (VideoError, OSError) as error:
        raise Dropped(str(error)) from None
    except Exception as error:  # one video in a hundred thousand does what no other has done
        raise Dropped(f"{source.video}: {type(error).__name__}: {error}") from None


def evenly(first: int, last: int, most: int) -> list[int]:
    """At most `most` whole numbers from `first` to `last`, both of them included, as far apart from each other."""
    count = min(most, last - first + 1)
    return [first] if count == 1 else [first + round(i * (last - first) / (count - 1)) for i in range(count)]
