"""What a validation says of a model in training: worked by hand, and against the objective's own numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from test_training import CONFIG, STAGE, batch, protocol  # noqa: F401  (fixtures)

from jstream.data.world.labels import WORDS
from jstream.protocols.protocol import RESPONSE, SILENCE, STANDBY
from jstream.training.step import batch_loss, prepare, with_weights
from jstream.training.validation import Turns, make_validation_step, summarize, time_differences, turns_of_row

S, B, R = SILENCE, STANDBY, RESPONSE


def turns(wanted, decided, judged=None, entropies=()):
    judged = np.ones(len(wanted), bool) if judged is None else np.asarray(judged, bool)
    return Turns(np.asarray(wanted), np.asarray(decided), judged, list(entropies))


@pytest.mark.parametrize(
    ("wanted", "decided", "frames"),
    [
        ([S, S, R, S], [S, S, R, S], [0]),  # in time
        ([S, S, R, S], [S, R, R, S], [1]),  # a frame too early
        ([S, S, R, S, S], [S, S, S, R, S], [1]),  # a frame too late
        ([S, S, R, S, S, S, S, S], [S, S, S, S, S, S, S, S], [3]),  # never: as many frames as its own turn has
        ([S, R, S, S, S, S], [S, S, S, S, S, R], [2]),  # so late that it counts as never
        ([S, R, S, S, R], [S, R, R, S, S], [0, 2]),  # what comes behind a response is early for the next one
        ([S, S, S], [R, R, R], []),
    ],
)
def test_the_time_difference_is_the_one_counted_by_hand(wanted, decided, frames):
    assert time_differences(turns(wanted, decided)) == frames


def test_a_response_that_a_question_forces_has_no_time_difference():
    assert time_differences(turns([S, R, S, R], [S, S, S, R], [True, False, True, True])) == [0]


def test_the_summary_is_the_one_worked_by_hand():
    one = turns([S, B, R, S], [S, S, R, R], entropies=[np.log(2.0)])
    other = turns([R, R], [R, S], [True, False], [np.log(4.0), np.log(6.0)])
    found = summarize([one, other], fps=2.0)
    assert found["state_accuracy"] == pytest.approx(3 / 5)
    assert found["reply_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["time_diff"] == pytest.approx(0.0)
    assert found["ppl"] == pytest.approx(4.0)


def test_nothing_to_measure_is_left_out():
    assert summarize([]) == {}
    assert summarize([turns([S, S], [S, S])]) == {"state_accuracy": 1.0}


def test_a_validation_step_finds_what_the_objective_finds(batch, protocol):  # noqa: F811
    config = dataclasses.replace(CONFIG, stages=(STAGE,))
    state, frozen = jax.jit(lambda: prepare(config, jax.random.key(0), len(WORDS)))()
    log_probs, scores = map(np.asarray, make_validation_step(config, protocol)(state, frozen, batch))
    whole = with_weights(batch, STAGE, protocol.decision_ids)
    sums = jax.jit(lambda: batch_loss(state.trained, frozen, whole, config, STAGE)[1])()
    value = lambda name: float(sums[name][0]) / float(sums[name][1])
    text, states = batch["kinds"] == 1, batch["kinds"] == 2
    assert -log_probs[text].mean() == pytest.approx(value("reply_loss"), rel=1e-5)
    assert -log_probs[states].mean() == pytest.approx(value("state_loss"), rel=1e-5)

    rows = [{name: x[i] for name, x in batch.items()} for i in range(len(batch["tokens"]))]
    made = [
        turns_of_row(row | {"log_probs": log_probs[i], "scores": scores[i]}, protocol) for i, row in enumerate(rows)
    ]
    assert sum(len(dialogue.wanted) for row in made for dialogue in row) == int((batch["decisions"] >= 0).sum())
    assert sum(len(row) for row in made) == int(batch["first"].sum())
    for row, dialogues in zip(rows, made):
        labels = row["labels"][row["decisions"][row["decisions"] >= 0]]
        wanted = np.concatenate([d.wanted for d in dialogues])
        np.testing.assert_array_equal(np.asarray(protocol.state_ids)[wanted], labels)
        replies = sum(len(d.cross_entropies) for d in dialogues)
        assert replies == (wanted == RESPONSE).sum()
