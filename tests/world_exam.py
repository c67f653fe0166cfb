"""World videos with questions of the official shapes: the twelve tasks of OVO-Bench."""

import json
import pathlib

from jstream.data import world
from jstream.data.world.write import write_worlds

SECONDS = 12, 15
CHOICES = ("EPM", "ASI", "HLD", "OCR", "ACR", "ATR", "STU", "FPD", "OJR")
OPTIONS = ["something enters", "something leaves", "something changes its colour", "nothing of these"]
VERBS = ("enter", "leave", "colour")


def write_videos(folder: pathlib.Path, num_videos: int) -> list[world.World]:
    """Writes `videos/000000.mp4` … of 12 to 15 seconds."""
    config = world.WorldConfig(*SECONDS)
    write_worlds(folder, num_videos, seed=61, config=config, size=96)
    return [world.make_world(61, index, config) for index in range(num_videos)]


def ovo_records(worlds: list[world.World]) -> list[dict]:
    """One question of each task, from the videos in turn."""
    records = []
    for number, task in enumerate((*CHOICES, "REC", "SSR", "CRR")):
        index = number % len(worlds)
        one = worlds[index]
        events = sorted(one.events, key=lambda event: event.end_frame)
        last = events[-1]
        record = {"id": 10 * number, "task": task, "video": f"world/{index:06d}.mp4"}
        if task in CHOICES:
            gt = VERBS.index(last.verb) if last.verb in VERBS else 3
            record |= {"realtime": last.end_frame + 0.5, "question": "What happened last?", "options": OPTIONS}
            record |= {"gt": gt, "answer": OPTIONS[gt]}
        elif task == "REC":
            ends = [event.end_frame for event in events]
            record |= {"activity": "move", "start_times": [event.start_frame for event in events], "end_times": ends}
            times = ends[:2]
            counts = [sum(end <= time for end in ends) for time in times]
            record["test_info"] = [{"realtime": time, "count": count} for time, count in zip(times, counts)]
        elif task == "SSR":
            steps = [f"the {event.name} moves" for event in events[:2]]
            record |= {"tutorial": "World", "all_steps": steps}
            record |= {"start_time": [e.start_frame for e in events[:2]], "end_time": [e.end_frame for e in events[:2]]}
            probes = [(max(e.start_frame - 1, 1), step, 0) for e, step in zip(events, steps)]
            probes += [(e.end_frame, step, 1) for e, step in zip(events, steps)]
            record["test_info"] = [{"realtime": time, "step": step, "type": kind} for time, step, kind in probes]
        else:
            ask, clue = 2, last.end_frame
            record |= {"question": "Tell me what happens.", "answer": "It moves.", "ask_time": ask, "clue_time": clue}
            record["test_info"] = [{"realtime": ask, "type": 0}, {"realtime": clue + 1, "type": 1}]
        records.append(record)
    return records


def write_ovo(folder: pathlib.Path, num_videos: int = 2) -> pathlib.Path:
    """Writes the videos and `ovo.json`; returns the latter."""
    path = folder / "ovo.json"
    path.write_text(json.dumps(ovo_records(write_videos(folder, num_videos))))
    return path
