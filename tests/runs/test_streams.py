"""What is claimed of rings and engines, for other protocols, towers and memories than the quick tests take."""

import pytest
import test_engine
import test_rings


@pytest.mark.parametrize(("name", "memory"), [("siglip", "window:4"), ("qwen", "sinks:4"), ("live", "sinks:4")])
def test_every_decision_sees_the_turns_that_are_kept_and_no_others(name, memory, monkeypatch):
    test_rings.test_every_decision_sees_the_turns_that_are_kept_and_no_others(name, memory, monkeypatch)


@pytest.mark.parametrize(
    ("name", "memory"), [("qwen", "append"), ("live", "append"), ("siglip", "sinks:4"), ("siglip", "reprefill:4")]
)
def test_every_stream_is_what_it_would_be_alone(name, memory):
    test_engine.test_every_stream_is_what_it_would_be_alone(name, memory)
