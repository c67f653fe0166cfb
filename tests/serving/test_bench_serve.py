"""The benchmark of the live server counts what it says it counts."""

import json
import subprocess
import sys

import pytest

from jstream.benchmarks import serve
from jstream.streaming.event import Event


def test_an_event_that_is_not_that_of_the_session_is_counted():
    known = [Event(0.0, "silence", {"silence": 0.9, "response": 0.1}), Event(0.5, "response", {"response": 1.0}, "A.")]
    seen = [event.to_dict() for event in known]
    assert serve.differences(seen, known) == (0, 0.0)
    assert serve.differences(seen[:1], known) == (1, 0.0)
    seen[1] |= {"text": "B.", "probs": {"response": 0.75}}
    assert serve.differences(seen, known) == (1, pytest.approx(0.25))


def test_clients_lose_no_frame_beside_hostile_ones(tmp_path):
    flags = ["--mode=serve", "--streams=2", "--frames=12", "--hostile", f"--out={tmp_path}"]
    subprocess.run([sys.executable, "-m", "jstream.bench", *flags], check=True, timeout=600)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["clients"] == report["hostile_clients"] == 2 and report["hostile_frames_a_client"] == 12
    assert report["frames_lost"] == report["hostile_frames_lost"] == report["events_unlike_offline"] == 0
    assert report["errors"] == report["hostile_errors"] == 0 and report["probabilities_off"] < 1e-4
    assert report["hostile_connections"] > 0 and 0 < report["p50_ms"] <= report["p95_ms"] <= report["most_ms"]
