"""Annotations of others become dialogues to train on: a file in Streamo's raw schema, or a TFDS dataset with frames."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from jstream.config import ConfigError
from jstream.data import streamo_instruct
from jstream.data.dialogue import Dialogue, DialogueError, write_raw
from jstream.data.prepare.videos import UNREADABLE, Folder, bare, file_name, probe, read_durations
from jstream.data.sources import SOURCES
from jstream.data.sources.clip import Clip, Counts, repair
from jstream.data.sources.tasks import TASKS, dialogues_of

_FILES = ".json", ".jsonl"


def prepare(
    source: str,
    annotations: str | pathlib.Path,
    tasks: Sequence[str],
    out: str | pathlib.Path,
    durations: str | pathlib.Path | None = None,
    videos: str | pathlib.Path | None = None,
    fps: float | None = None,
    workers: int = 1,
) -> tuple[pathlib.Path, Counts]:
    """Writes the dialogues of some tasks, and beside them what became of every record. Killed, it can be called again.

    Args:
        source: a key of `SOURCES`.
        annotations: a file of it (subtitles: or a folder).
        tasks: what the source is good for; none stands for the only one there is.
        out: `NAME.jsonl` or `NAME.json`, with the counts in `NAME.counts.json`; or a folder, for `dialogues.jsonl` and
            `counts.json`.
        durations: a table, for sources that keep durations apart (`videos.read_durations`).
        videos: folder in which the videos are looked for. Records of those that are missing or cannot be read are
            dropped, and unknown durations come from the files. Without it nothing is known of the files.
        fps: where given, the videos are decoded at so many frames a second into a dataset in the folder `out`
            (`data.streamo_instruct`).
        workers: videos opened or decoded at once.

    Returns:
        What `data.annotations.Annotations` opens, and the counts.

    Raises:
        ConfigError: for an unknown source or task, or where frames lack a folder.
        DialogueError: for files that cannot be read, or where no dialogue comes of them.
        OSError: where `out` cannot be written.
    """
    out = pathlib.Path(out)
    tasks = _checked(source, tasks)
    if fps is not None and (videos is None or out.suffix in _FILES):
        raise ConfigError("frames: expected a folder of videos and a folder to write to, found a file or nothing")
    clips = list(SOURCES[source].read(pathlib.Path(annotations)))
    known = {} if durations is None else read_durations(pathlib.Path(durations))
    clips = [_with_duration(clip, known.get(bare(clip.video))) for clip in clips]

    made, counts_file = output_files(out)
    made.parent.mkdir(parents=True, exist_ok=True)
    opened = made.with_name(made.name + ".opened")
    counts = Counts()
    if videos is None:
        clips = [dataclasses.replace(clip, video=file_name(clip.video)) for clip in clips]
    else:
        clips = _found(clips, Folder(pathlib.Path(videos).resolve()), opened, workers, counts)
    write_raw(made, _dialogues(clips, source, tasks, counts))
    if fps is not None:
        built = streamo_instruct.prepare(made, out, streamo_instruct.Sampling(fps=fps), workers)
        counts.videos["that could not be decoded, left out of the dataset"] = built["skipped"]
        made = built["folder"]
    partial = counts_file.with_name(counts_file.name + ".partial")
    partial.write_text(json.dumps(vars(counts), indent=1) + "\n", encoding="utf-8")
    partial.replace(counts_file)
    opened.unlink(missing_ok=True)
    return made, counts


def output_files(out: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the dialogues and the counts go."""
    if out.suffix in _FILES:
        return out, out.with_suffix(".counts.json")
    return out / "dialogues.jsonl", out / "counts.json"


def _checked(source: str, tasks: Sequence[str]) -> Sequence[str]:
    if source not in SOURCES:
        raise ConfigError(f"source: expected one of {', '.join(SOURCES)}, found {source!r}")
    offered = SOURCES[source].tasks
    tasks = [*dict.fromkeys(tasks)] or (offered if len(offered) == 1 else [])
    for task in tasks or [""]:
        if task not in offered:
            raise ConfigError(f"task: expected one of {', '.join(offered)} for {source}, found {task or 'none'!r}")
    return tasks


def _with_duration(clip: Clip, known: float | None) -> Clip:
    """What annotations say of a duration goes before what a table says."""
    said = clip.duration if clip.duration is not None and clip.duration > 0 else None  # also not NaN
    return dataclasses.replace(clip, duration=known if said is None else said)


def _found(clips: list[Clip], folder: Folder, opened: pathlib.Path, workers: int, counts: Counts) -> list[Clip]:
    """The clips whose videos are there, with their files."""
    files = {clip.video: folder.find(clip.video) for clip in clips}
    unknown = {file for clip in clips if clip.duration is None and not isinstance(file := files[clip.video], str)}
    lengths = probe(sorted(unknown), opened, workers)
    found = []
    for clip in clips:
        file = files[clip.video]
        if isinstance(file, str) or lengths.get(file, 0.0) is None:
            counts.leave_out(clip, file if isinstance(file, str) else UNREADABLE)
        else:
            found.append(dataclasses.replace(_with_duration(clip, lengths.get(file)), video=str(file)))
    return found


def _dialogues(clips: list[Clip], source: str, tasks: Sequence[str], counts: Counts) -> Iterator[Dialogue]:
    wanted = lambda record: any(TASKS[task].takes(record) for task in tasks)
    for clip in tqdm(clips, "preparing", unit="video", delay=2, dynamic_ncols=True):
        clip = repair(clip, counts, wanted)
        for task in tasks:
            for dialogue in dialogues_of(clip, task, source):
                counts.dialogues[dialogue.task] += 1
                yield dialogue
    if not counts.dialogues:
        reasons = ", ".join(f"{reason} ({number})" for reason, number in counts.dropped.most_common(3))
        raise DialogueError(
            f"{source}: expected records for {', '.join(tasks)}, found none of use: {reasons or 'no record'}"
        )
