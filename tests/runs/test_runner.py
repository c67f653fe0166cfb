"""The bundled model sits OVO-Bench's exam over world videos, through the command: killed and resumed, and whole."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import world_exam

import jstream
from jstream.data.prepare.videos import Folder
from jstream.evals import contest, ovo_bench, run_ovo, runner
from jstream.streaming.engine import Engine

COMPARED = ("predictions.json", "report.json", "report.md", "comparison.md")


@pytest.fixture(scope="module")
def annotations(tmp_path_factory):
    """The questions of all tasks, and two about videos that are missing or no video."""
    path = world_exam.write_ovo(tmp_path_factory.mktemp("world"))
    records = json.loads(path.read_text())
    records += [records[0] | {"id": 1, "video": "missing.mp4"}, records[-1] | {"id": 2, "video": "broken.mp4"}]
    path.write_text(json.dumps(records))
    (path.parent / "videos/broken.mp4").write_bytes(b"no video" * 1000)
    return path


def command(annotations, out, *flags):
    given = ["--benchmark=ovo_bench", f"--annotations={annotations}", f"--out={out}", *flags]
    log = open(f"{out}.log", "ab")
    return subprocess.Popen([sys.executable, "-m", "jstream.evaluate", *given], stdout=log, stderr=log)


def sit(annotations, out, *flags):
    return command(annotations, out, f"--videos={annotations.parent / 'videos'}", "--streams=2", *flags)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def whole(process, out):
    assert process.wait(300) == 0, (out.parent / f"{out.name}.log").read_text()[-2000:]
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.name in COMPARED}


def test_killed_twice_it_ends_with_the_same_report(annotations, tmp_path):
    flags = ("--protocol=streaming",)
    straight = whole(sit(annotations, tmp_path / "straight", *flags), tmp_path / "straight")

    out, kept = tmp_path / "killed", b""
    for file, enough in ((out / "progress.jsonl", 5), (out / "last_frames-4/progress.jsonl", 4)):
        process = sit(annotations, out, *flags)
        while lines(file) < enough and process.poll() is None:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and not (out / "comparison.md").exists()
        assert enough <= lines(file) < 15, "killed when some questions were done and some were not"
        done = (out / "progress.jsonl").read_bytes()
        assert done.startswith(kept[: kept.rfind(b"\n") + 1]), "what was done is kept"
        kept = done
    assert whole(sit(annotations, out, *flags), out) == straight
    again = (out / "progress.jsonl").read_text().splitlines()
    answers = [json.loads(line)["question"] for line in again[1:] if "failure" not in line]
    assert len(answers) == len(set(answers)) == 12, "nothing was asked twice"

    report = json.loads((out / "report.json").read_text())
    assert report["metrics"]["CRR"] == 50 and report["counts"]["CRR"] == {"numerator": 2.0, "cases": 4.0}
    assert "questions that failed, missing.mp4: its video is missing: 1 (1)" in report["notes"]
    assert any(line.startswith("questions that failed, broken.mp4: ") for line in report["notes"])
    head = (out / "comparison.md").read_text().splitlines()[0].split()
    assert head == ["|", "metric", "|", "model", "|", "always_silent", "|", "always_respond", "|", "last_frames:4", "|"]
    speed = json.loads((out / "last_frames-4/speed.json").read_text())
    assert 0 < speed["questions"] < 12 and speed["bound_by"] in ("the model", "decoding")

    rescored = tmp_path / "rescored"
    assert command(annotations, rescored, f"--predictions={out / 'predictions.json'}").wait(60) == 0
    for name in ("metrics", "intervals", "counts"):
        assert json.loads((rescored / "report.json").read_text())[name] == report[name]


def test_a_model_answers_when_asked_and_needs_no_more_frames_than_its_memory_keeps(annotations):
    model = jstream.load()
    engine = Engine(model, 2, "last_frames:4", max_new_tokens=contest.MAX_NEW_TOKENS)
    exam = run_ovo.exam(annotations, "official")
    questions = {name: question for name, question in exam.questions.items() if name not in ("1", "2")}

    def answers():
        clock, folder = runner.Clock(), Folder(annotations.parent / "videos")
        return {one.question: one.answer for one in runner.sit(engine, questions, folder, 1.0, clock)}, clock.frames

    assert engine.memory.turns == 4
    few, fewer = answers()
    engine.memory = dataclasses.replace(engine.memory, words=True)  # as if all of them left traces
    every, more = answers()
    assert few == every and fewer < 0.7 * more
    replies = [reply for answer in few.values() for reply in (answer if isinstance(answer, list) else [answer])]
    assert len(replies) == 9 + sum(len(json.loads(annotations.read_text())[i]["test_info"]) for i in (9, 10, 11))
    assert all(isinstance(reply, str) and reply for reply in replies)
    assert set(exam.predictions(few)) == set(ovo_bench.CATEGORIES)
