"""What training minimises: cross entropy on replies, Streamo's focal loss on state tokens, and two auxiliary losses.

Everything is f32 and works on flattened positions. The auxiliary losses name things in the decoder's own word
embeddings, so that what the vision tower sees arrives as words the decoder can say; they exist in training only.
"""

import jax
import jax.numpy as jnp
import optax


def state_weights(
    probability: jax.Array, states: jax.Array, num_states: int, variant: str, gamma: float, alpha: bool = True
) -> jax.Array:
    """Weight of the cross entropy of each state token.

    Streamo's focal loss: α_k (1 − p)^γ with α_k = Σ_j n_j / (|S| n_k), n_k the count of state k in the batch (arXiv
    2512.21334, section 3.3). The published code (maifoundations/Streamo, `swift/plugin/loss.py`) divides by the number
    of *distinct states present* instead of |S|. The gradient flows through p in both.

    Args:
        probability: f32 [P]: probability given to the right token.
        states: int32 [P]: index of the state, −1 where the target is no state token.
        num_states: |S|.
        variant: `ce` (weight 1), `focal` (the paper's) or `focal_released`.
        gamma: γ.
        alpha: whether to balance by α; the released code can switch it off.

    Returns:
        f32 [P]; 1 where states is −1.
    """
    if variant == "ce":
        return jnp.ones_like(probability)
    if variant not in ("focal", "focal_released"):
        raise ValueError(f"expected ce, focal or focal_released, found {variant!r}")
    weights = (1.0 - probability) ** gamma
    if alpha:
        counts = jnp.sum(jax.nn.one_hot(states, num_states), axis=0)  # −1 counts nowhere
        divisor = num_states if variant == "focal" else jnp.maximum(jnp.sum(counts > 0), 1)
        alphas = jnp.sum(counts) / jnp.maximum(counts, 1) / divisor
        weights = weights * alphas[jnp.maximum(states, 0)]
    return jnp.where(states >= 0, weights, 1.0)


def language_loss(
    logits: jax.Array,
    labels: jax.Array,
    learned: jax.Array,
    state_ids: tuple[int, ...],
    variant: str,
    gamma: float,
    alpha: bool = True,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Streamo's objective: weighted cross entropy, averaged over all supervised tokens.

    Args:
        logits: f32 [P, V].
        labels: int32 [P]: the token each position predicts.
        learned: bool [P].
        state_ids: token ids of the states.
        variant, gamma, alpha: see `state_weights`.

    Returns:
        The loss, and metrics: `reply_loss`, `reply_accuracy` (tokens), `state_loss`, `state_accuracy`, all unweighted.
    """
    log_probs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]
    is_state = labels[:, None] == jnp.asarray(state_ids)
    states = jnp.where(learned & is_state.any(axis=1), jnp.argmax(is_state, axis=1), -1)
    weights = state_weights(jnp.exp(picked), states, len(state_ids), variant, gamma, alpha)
    count = jnp.maximum(jnp.sum(learned), 1)
    loss = -jnp.sum(jnp.where(learned, weights * picked, 0.0)) / count

    right = jnp.argmax(logits, axis=-1) == labels
    metrics = {}
    for name, chosen in (("reply", learned & (states < 0)), ("state", states >= 0)):
        number = jnp.maximum(jnp.sum(chosen), 1)
        metrics[f"{name}_loss"] = -jnp.sum(jnp.where(chosen, picked, 0.0)) / number
        metrics[f"{name}_accuracy"] = jnp.sum(chosen & right) / number
    return loss, metrics


def naming_loss(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether each word applies, as independent yes/no questions.

    Args:
        logits: f32 [..., W].
        targets: uint8 [..., W]: 1 where the word applies.
        valid: bool [...].

    Returns:
        Cross entropy summed over words and averaged over what is valid, and the F1 of the words named at probability ½.
    """
    targets = targets.astype(jnp.float32)
    loss = jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)
    named = (logits > 0) * valid[..., None]
    hits = jnp.sum(named * targets)
    f1 = 2 * hits / jnp.maximum(jnp.sum(named) + jnp.sum(targets * valid[..., None]), 1)
    return jnp.sum(loss * valid) / jnp.maximum(jnp.sum(valid), 1), f1
