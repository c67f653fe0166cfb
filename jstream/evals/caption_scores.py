"""How alike two captions are: CIDEr, and METEOR with exact and stem matches.

Both are this project's own: the reference METEOR needs Java and tables of synonyms and paraphrases, and no light
package has either. CIDEr agrees with pycocoevalcap's on the same words. METEOR is that of 2005, without synonyms
(Banerjee and Lavie, "METEOR: An automatic metric for MT evaluation"). Papers report version 1.5, which has other
weights and matches more, so this one carries its own name, METEOR-stem, and is not to be compared with theirs.
"""

import collections
import math
import re
from collections.abc import Sequence

from jstream.evals.stemming import stem

_NGRAMS = 4
_SIGMA = 6.0  # of the length penalty
_SCALE = 10.0  # by which CIDEr is multiplied

Counts = collections.Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    """Lower-case words and numbers, without punctuation; `don't` is one."""
    return re.findall(r"[^\W_]+(?:'[^\W_]+)*", caption.casefold())


def meteor_stem(predicted: Sequence[str], reference: Sequence[str]) -> float:
    """METEOR of 2005 where words match if they have one stem.

    There are as many matches as there can be. The longest runs of words are matched first, so that they lie in few
    chunks. F weighs recall nine times as much as precision; chunks take up to half of it.
    """
    mine, theirs = [stem(word) for word in predicted], [stem(word) for word in reference]
    matches = sum((collections.Counter(mine) & collections.Counter(theirs)).values())
    if not matches:
        return 0.0
    precision, recall = matches / len(mine), matches / len(theirs)
    f_mean = 10 * precision * recall / (recall + 9 * precision)
    return f_mean * (1 - 0.5 * (_num_chunks(mine, theirs) / matches) ** 3)


def _num_chunks(mine: list[str], theirs: list[str]) -> int:
    """How many runs are matched, the longest common one first, until no word is left that matches."""
    a: list[str | None] = list(mine)
    b: list[str | None] = list(theirs)
    chunks = 0
    while True:
        longest, end_a, end_b = 0, 0, 0
        lengths = [0] * (len(b) + 1)  # of the common run that ends at a word of a and each of b
        for i, word in enumerate(a, start=1):
            last = 0
            for j, other in enumerate(b, start=1):
                last, lengths[j] = lengths[j], last + 1 if word is not None and word == other else 0
                if lengths[j] > longest:
                    longest, end_a, end_b = lengths[j], i, j
        if not longest:
            return chunks
        chunks += 1
        a[end_a - longest : end_a] = b[end_b - longest : end_b] = [None] * longest


def cider(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[float]:
    """CIDEr-D of captions, each with one reference; both as words (Vedantam et al., 2015, arXiv 1411.5726).

    The weights of n-grams come from how many of the references of these pairs they are in, so a pair alone has 0.
    """
    frequencies: Counts = collections.Counter()
    references = [_ngrams(reference) for _, reference in pairs]
    for reference in references:
        frequencies.update(set(reference))
    weigh = lambda counts: {
        gram: count * (math.log(len(pairs)) - math.log(max(1, frequencies[gram]))) for gram, count in counts.items()
    }
    scores = []
    for (predicted, reference), theirs in zip(pairs, references):
        a, b = weigh(_ngrams(predicted)), weigh(theirs)
        alike = [0.0] * (_NGRAMS + 1)  # by n; the first is empty
        norms = [[0.0] * (_NGRAMS + 1) for _ in range(2)]
        for gram, weight in a.items():
            alike[len(gram)] += min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0)
        for norm, weights in zip(norms, (a, b)):
            for gram, weight in weights.items():
                norm[len(gram)] += weight**2
        cosines = [x / math.sqrt(p * r) if p and r else 0.0 for x, p, r in zip(alike, *norms)]
        bigrams = max(len(predicted) - 1, 0) - max(len(reference) - 1, 0)  # lengths are told in bigrams
        scores.append(_SCALE * sum(cosines) / _NGRAMS * math.exp(-(bigrams**2) / (2 * _SIGMA**2)))
    return scores


def _ngrams(words: Sequence[str]) -> Counts:
    grams = (tuple(words[i : i + n]) for n in range(1, _NGRAMS + 1) for i in range(len(words) - n + 1))
    return collections.Counter(grams)
