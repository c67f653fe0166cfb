"""What training minimises: published golden values, cases worked by hand, and the plain forms they fall back to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jstream.training.losses import language_loss, naming_loss, state_weights

MASKED = -100  # of the published label arrays


def random_case(seed, positions=40, vocab=11, num_states=3, learned=0.7):
    """Logits, labels, learned, ids of the states: the last ones of the vocabulary, in half of the labels."""
    rng = np.random.default_rng(seed)
    state_ids = tuple(range(vocab - num_states, vocab))
    labels = np.where(
        rng.random(positions) < 0.5, rng.choice(state_ids, positions), rng.integers(0, vocab - num_states, positions)
    )
    logits = rng.normal(0, 2, (positions, vocab)).astype(np.float32)
    return logits, labels.astype(np.int32), rng.random(positions) < learned, state_ids


def by_hand(logits, labels, learned, state_ids, gamma, divisor=None, alpha=True):
    """Weighted cross entropy in plain f64 loops; `divisor` is |S|, or None for the number of states present."""
    counts = {k: int(np.sum(learned & (labels == k))) for k in state_ids}
    divisor = divisor or sum(count > 0 for count in counts.values())
    total = 0.0
    for row, label in zip(np.asarray(logits, np.float64)[learned], labels[learned], strict=True):
        p = np.exp(row[label] - row.max()) / np.sum(np.exp(row - row.max()))
        weight = 1.0
        if label in state_ids:
            weight = (1 - p) ** gamma
            weight *= sum(counts.values()) / counts[label] / divisor if alpha else 1.0
        total -= weight * np.log(p)
    return total / max(int(learned.sum()), 1)


# ------------------------------------------------------------------------------------------------ the published code


def test_the_released_loss_and_its_gradient_are_the_published_values(shared_data):
    golden = np.load(shared_data / "golden/streamo_focal_loss.npz")

    def loss_of(logits, labels, learned, gamma, alpha):
        states = tuple(logits.shape[-1] - k for k in (3, 2, 1))
        return language_loss(logits, labels, learned, states, "focal_released", gamma, alpha)[0]

    graded = jax.jit(jax.value_and_grad(loss_of), static_argnames="alpha")
    seen, cases, without_states, dropped = {}, 0, 0, 0
    for name in sorted({key[:4] for key in golden.files}):
        seed, batch, length, vocab, gamma, auto_alpha, dropped_state = golden[f"{name}_meta"]
        key = (seed, batch, length, vocab, dropped_state)
        if golden[f"{name}_logits"].size:
            seen[key] = golden[f"{name}_logits"], golden[f"{name}_labels"]
        logits, labels = seen[key]  # an empty case takes the arrays of the one before it
        assert logits.shape == (batch, length, vocab)
        targets = labels[:, 1:].reshape(-1)
        flat, learned = logits[:, :-1].reshape(-1, int(vocab)), targets != MASKED
        loss, gradient = graded(
            flat, np.where(learned, targets, 0).astype(np.int32), learned, gamma=float(gamma), alpha=bool(auto_alpha)
        )
        np.testing.assert_allclose(loss, golden[f"{name}_loss"], rtol=1e-5)
        norm = np.linalg.norm(np.asarray(gradient, np.float64))  # what is not shifted in has no gradient
        np.testing.assert_allclose(norm, golden[f"{name}_gradnorm"], rtol=1e-5)
        cases += 1
        without_states += not np.any(learned & (targets >= vocab - 3))
        dropped += dropped_state >= 0
    assert cases == 96 and without_states and dropped


# ----------------------------------------------------------------------------------------------------------- the paper


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("num_states", [2, 3])
def test_the_focal_loss_is_the_one_worked_by_hand(gamma, num_states):
    for seed in range(4):
        case = random_case(seed, num_states=num_states)
        for variant, divisor in (("focal", num_states), ("focal_released", None)):
            for alpha in (True, False):
                loss = language_loss(*case, variant, gamma, alpha)[0]
                np.testing.assert_allclose(loss, by_hand(*case, gamma, divisor, alpha), rtol=2e-6)


def test_the_smallest_focal_case_is_the_sum_on_paper():
    # two silences at p = 1/2 and 1/4, one response at p = 1/2, one word at p = 1/4; standby does not occur
    p = [[0.5, 0.25, 0.125, 0.125], [0.25, 0.5, 0.125, 0.125], [0.125, 0.25, 0.5, 0.125], [0.125, 0.125, 0.5, 0.25]]
    logits, labels, learned, state_ids = np.log(np.float32(p)), np.array([0, 0, 2, 3]), np.ones(4, bool), (0, 1, 2)
    silence, response = 3 / 2 / 3, 3 / 1 / 3  # α: (2 + 1) / n / |S|
    paper = (silence * 0.25 * np.log(2) + silence * 0.5625 * np.log(4) + response * 0.25 * np.log(2) + np.log(4)) / 4
    np.testing.assert_allclose(language_loss(logits, labels, learned, state_ids, "focal", 2.0)[0], paper, rtol=1e-6)
    # the published code divides by the two states that occur
    weighted = paper * 4 - np.log(4)
    released = (weighted * 3 / 2 + np.log(4)) / 4
    np.testing.assert_allclose(
        language_loss(logits, labels, learned, state_ids, "focal_released", 2.0)[0], released, rtol=1e-6
    )


def test_the_two_focal_losses_agree_when_every_state_occurs_and_differ_by_their_number_when_one_does_not():
    probability = jnp.array([0.2, 0.4, 0.6, 0.8, 0.5])
    whole = jnp.array([0, 1, 2, 0, -1])
    paper, released = (state_weights(probability, whole, 3, v, 2.0) for v in ("focal", "focal_released"))
    np.testing.assert_allclose(paper, released, rtol=1e-6)
    np.testing.assert_allclose(paper, [0.64 * 4 / 6, 0.36 * 4 / 3, 0.16 * 4 / 3, 0.04 * 4 / 6, 1.0], rtol=1e-5)
    without_standby = jnp.array([0, 2, 2, 0, -1])
    paper, released = (state_weights(probability, without_standby, 3, v, 2.0) for v in ("focal", "focal_released"))
    np.testing.assert_allclose(released[:4], 1.5 * paper[:4], rtol=1e-6)
    np.testing.assert_allclose(paper[:4], np.array([0.64, 0.36, 0.16, 0.04]) * 2 / 3, rtol=1e-5)
    assert paper[4] == released[4] == 1.0


@pytest.mark.parametrize("variant", ["focal", "focal_released"])
def test_alpha_is_one_for_states_that_occur_equally_often_or_alone(variant):
    probability = jnp.full(6, 0.5)
    weights = state_weights(probability, jnp.array([0, 1, 2, 0, 1, 2]), 3, variant, 2.0)
    np.testing.assert_allclose(weights, np.full(6, 0.25), rtol=1e-6)
    alone = state_weights(probability, jnp.zeros(6, jnp.int32), 3, variant, 2.0)
    np.testing.assert_allclose(alone, np.full(6, 0.25 / 3 if variant == "focal" else 0.25), rtol=1e-6)


@pytest.mark.parametrize("variant", ["ce", "focal", "focal_released"])
def test_text_without_a_state_is_plain_cross_entropy(variant):
    logits, labels, learned, state_ids = random_case(0)
    labels = labels % (logits.shape[1] - 3)
    loss = language_loss(logits, labels, learned, state_ids, variant, 2.0)[0]
    np.testing.assert_allclose(loss, by_hand(logits, labels, learned, (), 0.0), rtol=1e-6)


def test_the_gradient_flows_through_the_probability():
    logits, labels, learned, state_ids = random_case(5, positions=6)
    gradient = jax.grad(lambda x: language_loss(x, labels, learned, state_ids, "focal", 2.0)[0])(logits)
    for position, token in [(0, 0), (1, int(labels[1])), (4, int(labels[4])), (5, 9)]:
        step = np.zeros(logits.shape, np.float64)
        step[position, token] = 1e-5
        change = by_hand(logits + step, labels, learned, state_ids, 2.0, 3) - by_hand(
            logits - step, labels, learned, state_ids, 2.0, 3
        )
        np.testing.assert_allclose(gradient[position, token], change / 2e-5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["ce", "focal", "focal_released"])
def test_certain_and_hopeless_predictions_have_finite_gradients(variant):
    logits, labels = jnp.array([[80.0, 0.0, -80.0], [80.0, 0.0, -80.0]]), jnp.array([0, 2])
    loss = lambda x: language_loss(x, labels, jnp.ones(2, bool), (0, 1, 2), variant, 2.0)[0]
    assert np.isfinite(jax.grad(loss)(logits)).all()


# ------------------------------------------------------------------------------------------------ cross entropy,
# metrics


def test_cross_entropy_is_that_of_optax():
    for seed in range(3):
        logits, labels, learned, state_ids = random_case(seed)
        loss, metrics = language_loss(logits, labels, learned, state_ids, "ce", 2.0)
        each = np.asarray(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), jnp.asarray(labels)))
        np.testing.assert_allclose(loss, each[learned].mean(), rtol=1e-6)
        state = np.isin(labels, state_ids)
        right = logits.argmax(axis=1) == labels
        for name, chosen in (("state", learned & state), ("reply", learned & ~state)):
            np.testing.assert_allclose(metrics[f"{name}_loss"], each[chosen].mean(), rtol=1e-6)
            np.testing.assert_allclose(metrics[f"{name}_accuracy"], right[chosen].mean(), rtol=1e-6)


@pytest.mark.parametrize("variant", ["ce", "focal", "focal_released"])
def test_what_is_not_learned_changes_nothing(variant):
    logits, labels, learned, state_ids = random_case(1)
    other = np.where(learned[:, None], logits, 1e4).astype(np.float32)
    elsewhere = np.where(learned, labels, state_ids[0]).astype(np.int32)
    loss = language_loss(logits, labels, learned, state_ids, variant, 2.0)[0]
    np.testing.assert_allclose(language_loss(other, elsewhere, learned, state_ids, variant, 2.0)[0], loss, rtol=1e-6)


def test_a_batch_with_nothing_to_learn_has_no_loss():
    logits, labels, _, state_ids = random_case(2)
    loss, metrics = language_loss(logits, labels, np.zeros(len(labels), bool), state_ids, "focal", 2.0)
    assert loss == 0 and all(value == 0 for value in metrics.values())


def test_an_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="expected ce, focal or focal_released, found 'focl'"):
        language_loss(*random_case(0), "focl", 2.0)


# ------------------------------------------------------------------------------------------------------------- naming


def test_the_naming_loss_is_the_sum_on_paper():
    logits = jnp.array([[[0.0, 2.0, -1.0], [9.0, 9.0, 9.0]], [[-3.0, 1.0, 0.5], [1.0, -1.0, 0.0]]])
    targets = jnp.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [1, 1, 0]]], jnp.uint8)
    valid = jnp.array([[True, False], [True, True]])
    s = lambda x: np.log1p(np.exp(x))  # −log σ(−x)
    rows = [s(0) + s(-2) + s(-1), s(-3) + s(1) + s(-0.5), s(-1) + s(1) + s(0)]
    loss, f1 = naming_loss(logits, targets, valid)
    np.testing.assert_allclose(loss, sum(rows) / 3, rtol=1e-6)
    # named: {1}, {1, 2}, {0}; to name: {0, 1}, {2}, {0, 1}
    np.testing.assert_allclose(f1, 2 * (1 + 1 + 1) / (4 + 5), rtol=1e-6)


def test_naming_nothing_valid_is_no_loss():
    loss, f1 = naming_loss(jnp.ones((2, 3)), jnp.ones((2, 3), jnp.uint8), jnp.zeros(2, bool))
    assert loss == 0 and f1 == 0
