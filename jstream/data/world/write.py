"""Worlds as files: H.264 videos and their dialogues in the raw schema. Every file appears whole or not at all."""

import collections
import functools
import json
import multiprocessing
import os
import pathlib

import av
import tqdm

from jstream.data import dialogue as dialogues_io
from jstream.data.world.draw import Renderer
from jstream.data.world.plan import make_world
from jstream.data.world.scene import World, WorldConfig, generator
from jstream.data.world.tasks import TASKS, make_dialogue
from jstream.errors import UserError

VERSION = 1  # of what a seed and an index mean; goes up whenever the same pair gives another video


class WorldError(UserError, ValueError):
    """A set of worlds that cannot be written; the message is one line."""


def write_video(world: World, path: str | pathlib.Path, size: int = 96, fps: int = 8, crf: int = 16) -> None:
    """Writes a world as an H.264 mp4 (yuv420p), frame k showing the time k / fps.

    Args:
        world: what to draw.
        path: where to; a file `path + ".partial"` stands there until it is whole.
        size: side of the frames in pixels, even.
        fps: frames a second.
        crf: x264's constant rate factor, 0 (lossless) to 51.

    Raises:
        OSError: where the file cannot be written.
    """
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    draw = Renderer(world, size)
    with av.open(str(partial), "w", format="mp4") as container:
        # x264's macroblock tree gives other bytes from run to run, even in one thread.
        options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for k in range(world.duration * fps):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(draw(k / fps), format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial, path)


def _video_name(index: int) -> str:
    return f"videos/{index:06d}.mp4"


def _write_one(index: int, out: pathlib.Path, seed: int, config: WorldConfig, size: int, fps: int, crf: int) -> int:
    path = out / _video_name(index)
    if not path.exists():
        write_video(make_world(seed, index, config), path, size, fps, crf)
    return index


def write_worlds(
    out: str | pathlib.Path,
    num_videos: int,
    seed: int = 0,
    config: WorldConfig | None = None,
    size: int = 96,
    fps: int = 8,
    crf: int = 16,
    workers: int = 1,
    progress: bool = False,
) -> dict:
    """Writes `videos/`, `dialogues.jsonl` (all tasks a video offers) and `world.json` under `out`.

    Videos that are already there are kept, so a run that was stopped goes on where it was.

    Args:
        out: the folder, made if missing.
        num_videos: how many, of indices 0 … num_videos − 1.
        seed, config: of the worlds.
        size, fps, crf: of the videos, see `write_video`.
        workers: processes; 1 stays in this one.
        progress: whether to show a progress bar.

    Returns:
        What `world.json` holds: settings and counts.

    Raises:
        WorldError: for a setting out of range, or where `out` holds videos of other settings.
        OSError: where the folder cannot be written.
    """
    config = config or WorldConfig()
    limits = {"num_videos": (num_videos, 1, 10**6), "seed": (seed, 0, 2**63), "size": (size, 16, 4096)}
    limits |= {"video_fps": (fps, 1, 240), "crf": (crf, 0, 51), "workers": (workers, 1, 1024)}
    for name, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise WorldError(f"{name}: expected {low} to {high}, found {value}")
    if size % 2:
        raise WorldError(f"size: expected an even number (H.264 halves the colour planes), found {size}")

    out = pathlib.Path(out)
    (out / "videos").mkdir(parents=True, exist_ok=True)
    settings = dict(version=VERSION, seed=seed, size=size, video_fps=fps, crf=crf, **vars(config))
    _check_settings(out / "world.json", settings)
    _write_json(out / "world.json", settings)

    job = functools.partial(_write_one, out=out, seed=seed, config=config, size=size, fps=fps, crf=crf)
    bar = tqdm.tqdm(total=num_videos, unit="video", disable=not progress)
    if workers == 1:
        for index in range(num_videos):
            job(index)
            bar.update()
    else:
        with multiprocessing.get_context("spawn").Pool(min(workers, num_videos)) as pool:
            for _ in pool.imap_unordered(job, range(num_videos)):
                bar.update()
    bar.close()

    seconds, dialogues = 0, []
    for index in range(num_videos):
        world = make_world(seed, index, config)
        seconds += world.duration
        for number, task in enumerate(TASKS):
            dialogue = make_dialogue(world, task, generator(seed, index, 2, number), _video_name(index))
            if dialogue is not None:
                dialogues.append(dialogue)
    dialogues_io.write_raw(out / "dialogues.jsonl", dialogues)
    counts = dict(collections.Counter(d.task for d in dialogues))
    summary = {**settings, "num_videos": num_videos, "seconds": seconds, "dialogues": counts}
    _write_json(out / "world.json", summary)
    return summary


def _check_settings(path: pathlib.Path, settings: dict) -> None:
    """Refuses a folder that holds another series: its videos would be kept as if they were of this one."""
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text())
        other = [name for name, value in settings.items() if found[name] != value]
    except (ValueError, KeyError, TypeError):
        raise WorldError(
            f"{path}: expected the settings of a world, found something else; use another folder"
        ) from None
    if other:
        differences = ", ".join(f"{name}={found[name]} (asked for {settings[name]})" for name in other)
        raise WorldError(
            f"{path}: this folder holds a world with {differences}; use another folder or the same settings"
        )


def _write_json(path: pathlib.Path, record: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)
