"""The streaming metrics of VideoLLM-online, on turns worked by hand."""

import math

import numpy as np
import pytest

from jstream.evals import report
from jstream.evals.live_metrics import NOT_LEARNED, Decisions, Measured, ReplyTurn, measure_dialogue, report_of

SILENCE, OPEN, WRONG = 7, 8, 99


def turn(decisions, words=(), probability=0.5, unlearned_frames=0, silence=None):
    """Frames of two tokens, the last of which decides; then reply tokens 1, 2, 3 …, of which some come out wrong.

    `decisions` has . for silence and ! for speaking, `words` whether each reply token is right.
    """
    labels, predicted, is_frame, p_silence = [], [], [], []
    for i in range(unlearned_frames + len(decisions)):
        learned = i >= unlearned_frames
        last = i == unlearned_frames + len(decisions) - 1
        speaks = learned and decisions[i - unlearned_frames] == "!"
        labels += [NOT_LEARNED, (OPEN if last else SILENCE) if learned else NOT_LEARNED]
        predicted += [WRONG, OPEN if speaks else SILENCE]
        is_frame += [True, True]
        p_silence += [0.0, 0.2 if speaks else 0.6 if silence is None else silence]
    for i, right in enumerate(words):
        labels, is_frame, p_silence = [*labels, i], [*is_frame, False], [*p_silence, 0.0]
        predicted.append(i if right else WRONG)
    log_probs = np.full(len(labels), math.log(probability))
    arrays = (labels, predicted, log_probs, p_silence, is_frame)
    return ReplyTurn(*map(np.array, arrays), num_frames=unlearned_frames + len(decisions))


def of(*turns, run_on=None, threshold=0.0):
    return measure_dialogue(turns, SILENCE, run_on, threshold)


def decisions(text):
    speaks = np.array([character == "!" for character in text])
    return Decisions(np.where(speaks, OPEN, SILENCE), np.where(speaks, 0.2, 0.6))


def test_a_perfect_turn():
    assert of(turn("...!", [1, 1, 1], probability=0.25)) == (4, 0, 1, 1)


def test_a_reply_is_correct_up_to_its_first_wrong_token():
    found = of(turn("..!", [1, 1, 0, 1, 1]))
    assert found.correctness == 2 / 5 and found.frames_off == 0 and found.fluency == (3 + 2) / 8


def test_perplexity_is_that_of_the_reply_alone():
    mixed = turn("..!", [1, 1])
    mixed.log_probs[-2:] = np.log([0.5, 0.125])
    mixed.log_probs[:-2] = -1000
    assert of(mixed).perplexity == pytest.approx(math.sqrt(2 * 8))


def test_speaking_too_early_counts_the_frames_that_were_left():
    found = of(turn(".!..", [1, 1]))
    assert found.frames_off == 2 and found.fluency == (4 - 2) / 6
    assert of(turn("!..!", [1, 1])).frames_off == 3  # only the first time counts


@pytest.mark.parametrize(
    ("further", "frames_off", "asked"),
    [("!", 1, 3), ("..!", 3, 3), ("...", 3, 3), (".!!", 2, 3)],
)
def test_a_model_that_never_speaks_inside_its_turn_is_run_on(further, frames_off, asked):
    calls = []

    def run_on(index, num_frames):
        calls.append((index, num_frames))
        return decisions(further.ljust(num_frames, "."))

    first, second = turn("....", [1, 1]), turn(".....!")
    found = of(first, second, run_on=run_on)
    assert calls == [(0, asked)]  # one frame fewer than the turn's own, not the six of the next
    assert found.frames_off == (frames_off + 0) / 2
    assert found.fluency == (4 - 1) / 6  # all but the decision to speak; the second turn has no reply


def test_a_silent_model_is_run_on_no_farther_than_the_next_turn():
    calls = []
    run_on = lambda index, num_frames: calls.append(num_frames) or decisions("." * num_frames)
    assert of(turn("." * 9, [1]), turn("!"), run_on=run_on).frames_off == 1 / 2 and calls == [1]
    assert of(turn("." * 9, [1]), turn("!")).frames_off == 1 / 2  # nothing to ask: silent as well


def test_a_silent_model_without_further_frames_counts_as_in_time():
    assert of(turn("....", [1, 0])) == (2, 0, (4 + 1) / 6, 1 / 2)  # the last turn
    assert of(turn(".", [1]), turn("!")).frames_off == 0  # a turn of one frame is run on over none


def test_the_threshold_speaks_where_silence_is_not_sure_enough():
    hesitant = turn("...!", [1], silence=0.6)
    assert of(hesitant, threshold=0.5).frames_off == 0
    assert of(hesitant, threshold=0.725).frames_off == 3
    late = of(
        turn("...", [1], silence=0.9), turn("..!", silence=0.9), run_on=lambda *_: decisions(".."), threshold=0.725
    )
    assert late.frames_off == (1 + 0) / 2  # run on, its first decision has 0.6


def test_frames_that_are_not_learned_decide_nothing_but_can_be_run_on():
    assert of(turn("..!", [1], unlearned_frames=5)) == (2, 0, 1, 1)
    calls = []
    run_on = lambda index, num_frames: calls.append(num_frames) or decisions("." * num_frames)
    of(turn("..", [1], unlearned_frames=3), turn("!", unlearned_frames=9), run_on=run_on)
    assert calls == [4]  # of five frames in all


def test_a_turn_without_what_is_measured_leaves_the_mean():
    assert of(turn("", [1, 0])) == (2, None, None, 0.5)
    assert of(turn(".!")) == (None, 0, None, None)
    assert of() == (None, None, None, None)


def test_the_report_has_seconds_and_means_over_dialogues():
    found = report_of([Measured(2.0, 3.0, 0.5, 1.0), Measured(4.0, 1.0, None, 0.0)], fps=2, threshold=0.725)
    assert found.metrics == {"LM-PPL": 3, "TimeDiff": 1, "Fluency": 50, "LM-Correctness": 50}
    assert found.cases["Fluency"] == (0.5, 1) and found.intervals["TimeDiff"] == (0.5, 1.5)
    assert "0.725" in found.rules["decision"] and "2 frames a second" in found.rules["TimeDiff"]
    assert "1.00 s" in report.table(found) and "resample dialogues" in report.markdown(found)


def test_arrays_of_different_lengths_are_no_turn():
    with pytest.raises(ValueError, match=r"expected arrays of one length, found lengths \[2, 3\]"):
        ReplyTurn(*[np.zeros(3)] * 4, np.zeros(2, bool), 1)
