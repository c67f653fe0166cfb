"""What training minimises: cross entropy on replies, weighted cross entropy on state tokens, two auxiliary losses.

Everything that depends on how often a state occurs is worked out from the labels of the whole batch before the model
runs (`token_weights`): all devices and all parts of a batch then add up to the same loss. What the model gives is only
log p of the right token and whether it was the most probable one (`token_scores`).

The auxiliary losses name things in the decoder's own word embeddings, so that what the vision tower sees arrives as
words the decoder can say; they exist in training only.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jstream.config import ObjectiveConfig
from jstream.protocols.protocol import STATE

LOGITS_AT_ONCE = 1 << 25  # f32 values of a row's logits that exist at a time: 128 MiB

# A sum and the number of what was summed: means of parts of a batch cannot be averaged, these can be added.
Sums = dict[str, tuple[jax.Array, jax.Array]]


def token_scores(
    hidden_BTD: jax.Array, labels_BT: jax.Array, logits: Callable[[jax.Array], jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """How probable the right tokens are, without ever holding the logits of a whole row.

    Args:
        hidden_BTD: the decoder's hidden states.
        labels_BT: int32: the right tokens.
        logits: [..., D] → f32 [..., V].

    Returns:
        f32 [B, T]: log p(label); bool [B, T]: whether the label is the most probable token.
    """

    def score(hidden, labels):
        log_probs = jax.nn.log_softmax(logits(hidden))
        picked = jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]
        return picked, jnp.argmax(log_probs, axis=-1) == labels

    batch, length, width = hidden_BTD.shape
    vocab_size = jax.eval_shape(logits, hidden_BTD[:1, :1]).shape[-1]
    block = max(LOGITS_AT_ONCE // vocab_size, 128)
    if length <= block:
        return score(hidden_BTD, labels_BT)
    blocks = -(-length // block)
    split = lambda x: jnp.moveaxis(
        jnp.pad(x, ((0, 0), (0, blocks * block - length)) + ((0, 0),) * (x.ndim - 2)).reshape(
            batch, blocks, block, *x.shape[2:]
        ),
        1, 0,
    )  # fmt: skip
    scored = jax.lax.map(lambda part: jax.checkpoint(score)(*part), (split(hidden_BTD), split(labels_BT)))
    picked, right = (jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length] for x in scored)
    return picked, right


# ---------------------------------------------------------------------------------------------------- state tokens


def state_indices(labels: jax.Array, kinds: jax.Array, state_ids: tuple[int, ...]) -> jax.Array:
    """int32, of the shape of labels: which state a position learns; −1 where it learns none.

    Args:
        kinds: int8: what each position learns (`protocols.protocol.Rendering`).
        state_ids: token ids of the states.
    """
    states = jnp.argmax(labels[..., None] == jnp.asarray(state_ids), axis=-1)
    return jnp.where(kinds == STATE, states, -1)


def _counts(states: jax.Array, num_states: int, segments: jax.Array | None, num_segments: int) -> jax.Array:
    """f32 [B, T, S]: how often each state occurs, in the whole batch or in the sample that a position belongs to."""
    ones = jax.nn.one_hot(states, num_states)  # −1 counts nowhere
    if segments is None:
        return jnp.broadcast_to(jnp.sum(ones, axis=(0, 1)), ones.shape)
    samples = jnp.arange(len(segments))[:, None] * num_segments + jnp.maximum(segments, 0)
    totals = jax.ops.segment_sum(
        ones.reshape(-1, num_states), samples.reshape(-1), num_segments=len(segments) * num_segments
    )
    return totals[samples]


def _balance(objective: ObjectiveConfig, counts: jax.Array) -> jax.Array:
    """f32 [..., S]: the weight of each state as far as it depends on the counts [..., S]; finite where a count is 0."""
    num_states = counts.shape[-1]
    every = lambda value: jnp.full(counts.shape, value, jnp.float32)
    total = jnp.sum(counts, axis=-1, keepdims=True)
    present = jnp.maximum(jnp.sum(counts > 0, axis=-1, keepdims=True), 1)
    match objective.states:
        case "focal" | "focal_released" if objective.alpha:
            return total / jnp.maximum(counts, 1) / (num_states if objective.states == "focal" else present)
        case "fixed":
            return jnp.broadcast_to(jnp.asarray(objective.fixed, jnp.float32), counts.shape)
        case "class_balanced":
            effective = -jnp.expm1(counts * jnp.log(objective.beta)) / (1.0 - objective.beta)  # E_k; β = 0 gives 1
            inverse = jnp.where(counts > 0, 1.0 / jnp.maximum(effective, 1e-6), 0.0)
            return inverse * present / jnp.maximum(jnp.sum(inverse, axis=-1, keepdims=True), 1e-6)
        case "silence_balanced":
            others = total[..., 0] - counts[..., 0]
            return every(1.0).at[..., 0].set(others / jnp.maximum(counts[..., 0], 1))
        case "live":
            return every(1.0).at[..., 0].set(objective.silence)
    return every(1.0)


def token_weights(
    labels: jax.Array,
    kinds: jax.Array,
    segments: jax.Array,
    objective: ObjectiveConfig,
    state_ids: tuple[int, ...],
    num_segments: int,
) -> tuple[jax.Array, jax.Array]:
    """The share of every position in the loss of its batch, from the labels alone.

    L = (1/N) Σ_t w_t (1 − p_t)^γ (−log p_t) over the N supervised positions; w is 1 and γ 0 but for states:

    - `ce`: w = 1. `fixed`: w_k as given.
    - `focal`: w_k = α_k = Σ_j n_j / (|S| n_k), n_k the count of state k (arXiv 2512.21334, section 3.3).
      `focal_released` divides by the number of *distinct states present* instead of |S|, as the published code does
      (maifoundations/Streamo, `swift/plugin/loss.py`), which also counts in each sample (`balance="sample"`, its
      batches hold one). The gradient flows through p in both.
    - `class_balanced`: w_k ∝ 1 / E_k, E_k = (1 − β^{n_k}) / (1 − β), scaled to sum to the number of states present
      (Cui et al., arXiv 1901.05555).
    - `silence_balanced`: silences together weigh as much as all other states together.
    - `live`: silence weighs w, all else 1 (arXiv 2406.11816, equation 2; the published code gives w to whatever follows
      a frame, which is the same at its w = 1).

    Args:
        labels: int32 [B, T]. kinds: int8 [B, T]. segments: int32 [B, T]: which sample of the row.
        state_ids: token ids of the states, silence first.
        num_segments: more than the largest of segments.

    Returns:
        int32 [B, T]: the state that is learned, or −1; f32 [B, T]: w_t / N, 0 where nothing is learned.
    """
    states = state_indices(labels, kinds, state_ids)
    per_sample = objective.balance == "sample"
    counts = _counts(states, len(state_ids), segments if per_sample else None, num_segments)
    of_states = jnp.take_along_axis(_balance(objective, counts), jnp.maximum(states, 0)[..., None], axis=-1)[..., 0]
    weights = jnp.where(states >= 0, of_states, 1.0)
    learned = kinds > 0
    return states, jnp.where(learned, weights / jnp.maximum(jnp.sum(learned), 1), 0.0)


def language_loss(
    log_probs: jax.Array,
    right: jax.Array,
    kinds: jax.Array,
    states: jax.Array,
    weights: jax.Array,
    objective: ObjectiveConfig,
) -> tuple[jax.Array, Sums]:
    """The language objective over positions of any shape; parts of a batch add up to that of the whole.

    Args:
        log_probs, right: as `token_scores` gives them.
        kinds: int8: what each position learns.
        states, weights: as `token_weights` gives them.

    Returns:
        The loss, and sums for `reply_loss`, `reply_accuracy` (tokens), `state_loss`, `state_accuracy`, unweighted.
    """
    learned = kinds > 0
    picked = jnp.where(learned, log_probs, 0.0)
    if objective.states in ("focal", "focal_released"):
        weights = jnp.where(states >= 0, weights * (1.0 - jnp.exp(picked)) ** objective.gamma, weights)
    sums = {}
    for name, chosen in (("reply", learned & (states < 0)), ("state", learned & (states >= 0))):
        number = jnp.sum(chosen)
        sums[f"{name}_loss"] = -jnp.sum(jnp.where(chosen, picked, 0.0)), number
        sums[f"{name}_accuracy"] = jnp.sum(chosen & right), number
    return -jnp.sum(weights * picked), sums


# --------------------------------------------------------------------------------------------------- auxiliary losses


def naming_loss(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple]:
    """Whether each word applies, as independent yes/no questions.

    Args:
        logits: f32 [..., W].
        targets: uint8 [..., W]: 1 where the word applies.
        weights: f32 [...]: share of each place in the loss of its batch; 0 where there is nothing to name.

    Returns:
        Cross entropy summed over words and weighted, and sums for the F1 of the words named at probability ½.
    """
    targets = targets.astype(jnp.float32)
    loss = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)
    valid = (weights > 0)[..., None]
    named = (logits > 0) * valid
    f1 = 2 * jnp.sum(named * targets), jnp.sum(named) + jnp.sum(targets * valid)
    return jnp.sum(loss * weights), f1
