"""What training minimises: published golden values, cases worked by hand, and the plain forms they fall back to."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jstream.config import ConfigError, ObjectiveConfig
from jstream.protocols.protocol import NOT_LEARNED, STATE, TEXT
from jstream.training import losses
from jstream.training.losses import naming_loss, token_scores, token_weights

MASKED = -100  # of the published label arrays


def language_loss(logits, labels, learned, state_ids, variant="ce", gamma=2.0, alpha=True, segments=None, **settings):
    """The loss of positions [P] or rows [B, T] of logits, and its metrics, through all that training goes through."""
    rows = lambda x: jnp.asarray(x)[None] if jnp.ndim(labels) == 1 else jnp.asarray(x)
    labels, learned, hidden = rows(labels), rows(learned), rows(logits)  # the hidden states are the logits
    is_state = (labels[..., None] == jnp.asarray(state_ids, int)).any(axis=-1)
    kinds = jnp.where(learned, jnp.where(is_state, STATE, TEXT), NOT_LEARNED)
    objective = ObjectiveConfig(states=variant, gamma=gamma, alpha=alpha, **settings)
    num_segments = 1 if segments is None else int(np.max(segments)) + 1
    segments = jnp.zeros_like(labels) if segments is None else segments
    states, weights = token_weights(labels, kinds, segments, objective, state_ids, num_segments)
    scores = token_scores(hidden, labels, lambda x: x)
    loss, sums = losses.language_loss(*scores, kinds, states, weights, objective)
    return loss, {name: total / jnp.maximum(number, 1) for name, (total, number) in sums.items()}


def state_weights(probability, states, num_states, variant, gamma, alpha=True, **settings):
    """The weight of each position beside its 1 / N."""
    kinds = jnp.where(states >= 0, STATE, TEXT)[None]
    objective = ObjectiveConfig(states=variant, gamma=gamma, alpha=alpha, **settings)
    labels = jnp.where(states >= 0, states, num_states)[None]
    _, weights = token_weights(labels, kinds, jnp.zeros_like(labels), objective, tuple(range(num_states)), 1)
    focal = (1 - probability) ** gamma if variant.startswith("focal") else 1.0
    return weights[0] * len(probability) * jnp.where(states >= 0, focal, 1.0)


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

    graded = jax.jit(jax.value_and_grad(loss_of), static_argnames=("gamma", "alpha"))
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
    with pytest.raises(ConfigError, match="expected ce, fixed, focal, .* or live, found 'focl'"):
        language_loss(*random_case(0), "focl", 2.0)


# ------------------------------------------------------------------------------------------------ the other variants

PROBABILITY = jnp.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
MOSTLY_SILENT = jnp.array([0, 0, 0, 2, 1, -1])  # three silences, a response, a standby, a word


def test_fixed_weights_are_those_that_are_given():
    weights = state_weights(PROBABILITY, MOSTLY_SILENT, 3, "fixed", 2.0, fixed=(0.3, 1.3, 2.0))
    np.testing.assert_allclose(weights, [0.3, 0.3, 0.3, 2.0, 1.3, 1.0], rtol=1e-6)


def test_class_balanced_weights_are_the_ones_worked_by_hand():
    # β = 1/2: E = 2 (1 − 2^−n): 1.75 for three silences, 1 for one of the others; the weights sum to 3
    weights = state_weights(PROBABILITY, MOSTLY_SILENT, 3, "class_balanced", 2.0, beta=0.5)
    inverse = np.array([1 / 1.75, 1.0, 1.0])
    silence, standby, response = 3 * inverse / inverse.sum()
    np.testing.assert_allclose(weights, [silence, silence, silence, response, standby, 1.0], rtol=1e-5)
    assert silence + standby + response == pytest.approx(3)


def test_class_balanced_weights_leave_out_a_state_that_does_not_occur():
    weights = state_weights(jnp.full(3, 0.5), jnp.array([0, 0, 2]), 3, "class_balanced", 2.0, beta=0.5)
    inverse = np.array([1 / 1.5, 1.0])
    np.testing.assert_allclose(weights, (2 * inverse / inverse.sum())[[0, 0, 1]], rtol=1e-5)
    np.testing.assert_allclose(state_weights(PROBABILITY, MOSTLY_SILENT, 3, "class_balanced", 2.0, beta=0.0), 1.0)


def test_balanced_silences_weigh_as_much_as_all_else():
    weights = np.asarray(state_weights(PROBABILITY, MOSTLY_SILENT, 3, "silence_balanced", 2.0))
    np.testing.assert_allclose(weights, [2 / 3, 2 / 3, 2 / 3, 1, 1, 1], rtol=1e-6)


def test_live_weighs_silence_alone():
    weights = state_weights(jnp.full(4, 0.5), jnp.array([0, 1, 0, -1]), 2, "live", 2.0, silence=0.25)
    np.testing.assert_allclose(weights, [0.25, 1.0, 0.25, 1.0], rtol=1e-6)


def test_lives_objective_is_the_papers_sum():
    """(1/N) Σ −log p(next word) − w log p(silence), by hand."""
    p = np.float32([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.25, 0.5]])
    labels, learned, silence, speak = np.array([0, 1, 2]), np.ones(3, bool), 0, 1  # a silence, a start, a word
    for w in (1.0, 0.5):
        loss, _ = language_loss(np.log(p), labels, learned, (silence, speak), "live", silence=w)
        np.testing.assert_allclose(loss, (-w * np.log(0.5) - np.log(0.75) - np.log(0.5)) / 3, rtol=1e-6)


@pytest.mark.parametrize("variant", ["focal", "focal_released", "class_balanced", "silence_balanced"])
def test_balance_by_sample_is_the_mean_of_the_samples_alone(variant):
    """Two samples in one row, and one in another: as if each were a batch of its own."""
    logits, labels, learned, state_ids = random_case(7, positions=60)
    segments = np.repeat([0, 1, 0], 20)
    parts = [slice(0, 20), slice(20, 40), slice(40, 60)]
    alone = [language_loss(logits[p], labels[p], learned[p], state_ids, variant)[0] * learned[p].sum() for p in parts]
    rows = lambda x: np.stack([np.asarray(x)[:40], np.concatenate([x[40:], x[:20]])])
    learned_rows = rows(learned)
    learned_rows[1, 20:] = False  # padding
    together, _ = language_loss(
        rows(logits), rows(labels), learned_rows, state_ids, variant, balance="sample", segments=rows(segments)
    )
    np.testing.assert_allclose(together, sum(alone) / learned.sum(), rtol=1e-5)


@pytest.mark.parametrize("variant", ["focal", "class_balanced"])
def test_parts_of_a_batch_add_up_to_its_loss(variant):
    logits, labels, learned, state_ids = random_case(8, positions=40)
    whole, _ = language_loss(logits, labels, learned, state_ids, variant)
    kinds = np.where(learned, np.where(np.isin(labels, state_ids), STATE, TEXT), NOT_LEARNED)[None]
    objective = ObjectiveConfig(states=variant)
    states, weights = token_weights(labels[None], kinds, np.zeros_like(labels)[None], objective, state_ids, 1)
    total = 0.0
    for part in (slice(0, 7), slice(7, 25), slice(25, 40)):
        scores = token_scores(logits[None, part], labels[None, part], lambda x: x)
        total += losses.language_loss(*scores, kinds[:, part], states[:, part], weights[:, part], objective)[0]
    np.testing.assert_allclose(total, whole, rtol=1e-6)


def test_scores_in_blocks_are_those_of_the_whole_row(monkeypatch):
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 700, 8)).astype(np.float32), rng.normal(size=(8, 50)).astype(np.float32)
    labels = rng.integers(0, 50, (2, 700))

    def score(hidden, head):
        picked, right = token_scores(hidden, labels, lambda x: x @ head)
        return jnp.mean(picked * jnp.cos(jnp.arange(700))), (picked, right)

    whole = jax.value_and_grad(score, argnums=(0, 1), has_aux=True)(hidden, head)
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", 50 * 256)  # 256 positions a block, the last one not full
    text = str(jax.make_jaxpr(lambda h: score(h, head)[0])(hidden))
    assert "2,700,50" not in text and "2,256,50" in text
    blocks = jax.value_and_grad(score, argnums=(0, 1), has_aux=True)(hidden, head)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocks)):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- naming


def test_the_naming_loss_is_the_sum_on_paper():
    logits = jnp.array([[[0.0, 2.0, -1.0], [9.0, 9.0, 9.0]], [[-3.0, 1.0, 0.5], [1.0, -1.0, 0.0]]])
    targets = jnp.array([[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [1, 1, 0]]], jnp.uint8)
    valid = jnp.array([[True, False], [True, True]])
    s = lambda x: np.log1p(np.exp(x))  # −log σ(−x)
    rows = [s(0) + s(-2) + s(-1), s(-3) + s(1) + s(-0.5), s(-1) + s(1) + s(0)]
    loss, (twice_right, named) = naming_loss(logits, targets, valid / 3)
    np.testing.assert_allclose(loss, sum(rows) / 3, rtol=1e-6)
    # named: {1}, {1, 2}, {0}; to name: {0, 1}, {2}, {0, 1}
    np.testing.assert_allclose(twice_right / named, 2 * (1 + 1 + 1) / (4 + 5), rtol=1e-6)


def test_naming_nothing_valid_is_no_loss():
    loss, (twice_right, named) = naming_loss(jnp.ones((2, 3)), jnp.ones((2, 3), jnp.uint8), jnp.zeros(2))
    assert loss == 0 and twice_right == 0 and named == 0
