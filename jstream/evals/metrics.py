"""The measures that benchmarks share: matching of timed replies, F1, and bootstrap intervals.

Everything here is about plain numbers and texts; what counts as a reply, and over what a measure is pooled, is the
business of a benchmark. A ratio without cases is None, never 0 or 1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE = 1.0  # seconds a reply may be early or late: one turn at one frame a second
RESAMPLES = 1000  # of the bootstrap: enough for the second digit of the ends of an interval
_ROUNDING = 1e-6  # seconds: the tolerance is inclusive, also for times that are sums of fractions


class Reply(NamedTuple):
    """Something said: seconds since the start of the stream, and the words."""

    time: float
    text: str


def ratio(numerator: float, denominator: float) -> float | None:
    """The ratio, or None without cases."""
    return numerator / denominator if denominator else None


def f1(matches: int, num_predicted: int, num_reference: int) -> float | None:
    """2 · matches / (predicted + reference), the harmonic mean of precision and recall; None where both are empty."""
    return ratio(2 * matches, num_predicted + num_reference)


def match_replies(
    predicted: Sequence[Reply], reference: Sequence[Reply], tolerance: float = TOLERANCE, exact: bool = False
) -> list[tuple[int, int]]:
    """Matches replies one to one: as many pairs as there can be, and among those matchings one of least total |Δt|.

    Args:
        predicted, reference: in any order.
        tolerance: seconds; a pair lies at most so far apart.
        exact: whether the two of a pair also need the same text, but for blanks around it.

    Returns:
        Pairs of indices (predicted, reference), in order of the predicted ones.
    """
    pairs = []
    texts = {reply.text.strip() for reply in reference} if exact else {None}
    for text in texts:  # a pair never crosses from one text to another, so each can be matched by itself
        mine, theirs = (
            [i for i, reply in enumerate(replies) if text is None or reply.text.strip() == text]
            for replies in (predicted, reference)
        )
        found = _match_times([predicted[i].time for i in mine], [reference[i].time for i in theirs], tolerance)
        pairs += [(mine[i], theirs[j]) for i, j in found]
    return sorted(pairs)


def _match_times(predicted: list[float], reference: list[float], tolerance: float) -> list[tuple[int, int]]:
    """The same for times alone.

    Two pairs that cross in time can be uncrossed without a larger distance, so an alignment in order of time is enough:
    `best[i][j]` is (pairs, −total distance) of the first i predicted and the first j reference times.
    """
    rows, columns = (sorted(range(len(t)), key=t.__getitem__) for t in (predicted, reference))
    best = [[(0, 0.0)] * (len(columns) + 1) for _ in range(len(rows) + 1)]
    paired = [[False] * (len(columns) + 1) for _ in range(len(rows) + 1)]
    for i, row in enumerate(rows, start=1):
        for j, column in enumerate(columns, start=1):
            best[i][j] = max(best[i - 1][j], best[i][j - 1])
            away = abs(predicted[row] - reference[column])
            if away <= tolerance + _ROUNDING:
                pairs, distance = best[i - 1][j - 1]
                with_pair = (pairs + 1, distance - away)
                if with_pair > best[i][j]:
                    best[i][j], paired[i][j] = with_pair, True
    found, i, j = [], len(rows), len(columns)
    while i and j:
        if paired[i][j]:
            i, j = i - 1, j - 1
            found.append((rows[i], columns[j]))
        elif best[i][j] == best[i - 1][j]:
            i -= 1
        else:
            j -= 1
    return found


def bootstrap(
    numerators: Sequence[float],
    denominators: Sequence[float] | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of Σ numerators / Σ denominators (Efron and Tibshirani, 1993, chapter 13).

    What is drawn again, with replacement, is what an entry stands for: a dialogue with its sums, or a single value.

    Args:
        numerators: one a unit.
        denominators: one a unit; None stands for ones, which makes it the interval of a mean.
        level: how much of the resampled ratios lies inside.
        seed: of the draws: the same numbers give the same interval.

    Returns:
        The ends, or None without cases. Draws without cases are passed over.
    """
    denominators = [1.0] * len(numerators) if denominators is None else denominators
    sums = np.array(list(zip(numerators, denominators, strict=True)), float).reshape(-1, 2)  # [D, 2]
    if not sums[:, 1].sum():
        return None
    generator = np.random.Generator(np.random.PCG64(seed))
    times_drawn = generator.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=resamples)  # [R, D]
    above, below = (times_drawn @ sums).T
    low, high = np.quantile(above[below > 0] / below[below > 0], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
