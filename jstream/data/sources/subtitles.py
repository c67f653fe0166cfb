"""Subtitles: SRT or WebVTT, a file for each video of the same name, or a folder of such files.

    00:01:02.500 --> 00:01:04.000 align:start
    <v Ann>The kettle boils.

A cue is an event. Markup is taken out, and the lines of a cue become one.
"""

import pathlib
import re
from collections.abc import Iterator

from jstream.data.dialogue import DialogueError
from jstream.data.sources.clip import Clip, Event
from jstream.data.sources.files import read_text, seconds

EXTENSIONS = ".srt", ".vtt"
_TIMES = re.compile(r"^[ \t]*([\d:.,]+)[ \t]+-->[ \t]+([\d:.,]+)(?:[ \t].*)?$", re.MULTILINE)
_MARKUP = re.compile(r"<[^>\n]*>|\{\\[^}\n]*\}")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&nbsp;": " ", "&lrm;": "", "&rlm;": "", "&amp;": "&"}  # of WebVTT


def read(path: pathlib.Path) -> Iterator[Clip]:
    files = sorted(file for file in path.rglob("*") if file.suffix in EXTENSIONS) if path.is_dir() else [path]
    if not files:
        raise DialogueError(f"{path}: expected subtitles ({' or '.join(EXTENSIONS)}), found none")
    for file in files:
        video = file.relative_to(path) if path.is_dir() else pathlib.Path(file.name)
        yield Clip(video.with_suffix("").as_posix(), None, tuple(_cues(file)))


def _cues(path: pathlib.Path) -> Iterator[Event]:
    content = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    blocks = [block for block in re.split(r"\n[ \t]*\n", content) if not block.startswith(("NOTE", "STYLE", "REGION"))]
    cues = [(times, block[times.end() :]) for block in blocks if (times := _TIMES.search(block))]
    if not cues and content.strip().partition("\n")[0].split()[:1] != ["WEBVTT"]:
        raise DialogueError(f"{path}: expected cues such as 00:01:02.500 --> 00:01:04.000, found none")
    for times, said in cues:
        said = _MARKUP.sub("", said)
        for entity, character in _ENTITIES.items():
            said = said.replace(entity, character)
        yield Event(" ".join(said.split()), seconds(times[1]), seconds(times[2]))
