"""Where the videos of annotations lie, and how long they are: by their names in a folder, a table, or their files."""

import collections
import concurrent.futures
import contextlib
import json
import pathlib
from collections.abc import Iterable

from tqdm import tqdm

from jstream.data.dialogue import DialogueError
from jstream.data.sources.files import expected, read_csv, read_json, seconds
from jstream.data.video import VideoError, open_video

EXTENSIONS = frozenset(".3gp .avi .flv .gif .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .ts .webm .wmv".split())
MISSING = "its video is missing"
AMBIGUOUS = "several videos have its name"
UNREADABLE = "its video cannot be read"

_NAMES = "video_id", "id", "video_uid", "video"  # of EPIC-KITCHENS, Charades and Ego4D
_DURATIONS = "duration", "length", "duration_sec"


def bare(video: str) -> str:
    """The name of a video without its folder and its extension, which "x_210.0_360.0" has none of."""
    name = pathlib.PurePosixPath(video).name
    stem, dot, extension = name.rpartition(".")
    return stem if stem and dot + extension.lower() in EXTENSIONS else name


def file_name(video: str) -> str:
    """How the file of a video is called where nobody has looked: annotations may give an identifier alone."""
    return video if bare(video) != pathlib.PurePosixPath(video).name else f"{video}.mp4"


class Folder:
    """The videos under a folder, by name.

    Raises:
        DialogueError: where there is none.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._files: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
        for file in path.rglob("*"):
            if file.suffix.lower() in EXTENSIONS:
                self._files[bare(file.name)].append(file)
        if not self._files:
            raise DialogueError(f"{path}: expected a folder of videos, found none")

    def find(self, video: str) -> pathlib.Path | str:
        """The file of a video, by its path in the folder, else by its name with any extension; or why there is none.

        A name may begin with "v_", as in ActivityNet, where the file's does not.
        """
        exact = self.path / video
        if exact.suffix.lower() in EXTENSIONS and exact.is_file() and ".." not in exact.parts:
            return exact
        name = bare(video)
        files = self._files.get(name) or self._files.get(name.removeprefix("v_")) or []
        return files[0] if len(files) == 1 else AMBIGUOUS if files else MISSING


def read_durations(path: pathlib.Path) -> dict[str, float]:
    """Seconds of each video, by its bare name.

    Args:
        path: a CSV file with columns such as `video_id,duration` (EPIC-KITCHENS) or `id,length` (Charades); or JSON:
            {video: seconds}, {video: {"duration": seconds}}, or {"videos": [{"video_uid", "duration_sec"}]} (Ego4D).

    Raises:
        DialogueError: for anything else.
    """
    if path.suffix == ".csv":
        rows = list(read_csv(path))
    else:
        content = read_json(path, dict)
        rows = content["videos"] if isinstance(content.get("videos"), list) else None
        if rows is None:
            record = lambda value: value if isinstance(value, dict) else {"duration": value}
            rows = [record(value) | {"video": video} for video, value in content.items()]
    durations = {}
    for number, row in enumerate(rows):
        row = expected(row, dict, f"{path}, record {number}")
        video, length = (next((row[key] for key in keys if key in row), None) for keys in (_NAMES, _DURATIONS))
        if not isinstance(video, str) or length is None:
            names = " or ".join(_NAMES), " or ".join(_DURATIONS)
            raise DialogueError(
                f"{path}, record {number}: expected {names[0]}, and {names[1]}, found {list(row)!r:.120}"
            )
        if seconds(length) > 0:  # else it is as good as not there
            durations[bare(video)] = seconds(length)
    return durations


def probe(files: Iterable[pathlib.Path], kept: pathlib.Path, workers: int) -> dict[pathlib.Path, float | None]:
    """Seconds of each video file; None for one that cannot be read.

    Args:
        kept: a file where each answer is written as it comes, so that what was stopped goes on.
        workers: threads.
    """
    known: dict[str, float | None] = {}
    if kept.exists():
        for line in kept.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line that a kill has cut
                known.update(json.loads(line))
    asked = {file: json.dumps([str(file), file.stat().st_size, file.stat().st_mtime_ns]) for file in files}
    left = {file: key for file, key in asked.items() if key not in known}
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a", encoding="utf-8") as out, concurrent.futures.ThreadPoolExecutor(workers) as executor:
        try:
            lengths = executor.map(_length, left)
            for key, length in zip(left.values(), tqdm(lengths, "opening", len(left), unit="video", delay=2)):
                known[key] = length
                out.write(json.dumps({key: length}) + "\n")
                out.flush()
        finally:
            executor.shutdown(cancel_futures=True)
    return {file: known[key] for file, key in asked.items()}


def _length(file: pathlib.Path) -> float | None:
    try:
        with open_video(file, fps=1.0) as video:
            return video.duration or float(sum(1 for _ in video))  # a header that does not say: by its seconds
    except VideoError:
        return None
