"""The stem of an English word, by Porter's algorithm (1980, "An algorithm for suffix stripping", Program 14).

`words` and `word` have one stem, as have `cut` and `cuts`; irregular forms do not. METEOR's stems are these.
"""

import functools
import re

# A suffix and what takes its place, where enough is before it; of those that fit, the longest is looked at.
_STEP_2 = {
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "abli": "able", "alli": "al",
    "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
    "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
}  # fmt: skip
_STEP_3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
_SUFFIXES = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = {suffix: "" for suffix in _SUFFIXES.split()}


@functools.lru_cache(2**16)
def stem(word: str) -> str:
    """The stem of a lower-case word; one with other characters than a to z stays as it is."""
    if len(word) <= 2 or not re.fullmatch("[a-z]+", word):
        return word
    word = _plural(word)
    word = _past(word)
    if word.endswith("y") and "v" in _shape(word[:-1]):
        word = f"{word[:-1]}i"
    for table, least in ((_STEP_2, 1), (_STEP_3, 1), (_STEP_4, 2)):
        word = _replaced(word, table, least)
    if word.endswith("e"):
        before = word[:-1]
        if _measure(before) > 1 or (_measure(before) == 1 and not _is_short(before)):
            word = before
    return word[:-1] if word.endswith("ll") and _measure(word[:-1]) > 1 else word


def _plural(word: str) -> str:
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _past(word: str) -> str:
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    ending = next((ending for ending in ("ed", "ing") if word.endswith(ending)), None)
    if ending is None or "v" not in _shape(before := word.removesuffix(ending)):
        return word
    if before.endswith(("at", "bl", "iz")):
        return f"{before}e"
    if before[-2:-1] == before[-1] and _shape(before)[-1] == "c" and before[-1] not in "lsz":
        return before[:-1]
    return f"{before}e" if _measure(before) == 1 and _is_short(before) else before


def _replaced(word: str, table: dict[str, str], least: int) -> str:
    suffix = max((suffix for suffix in table if word.endswith(suffix)), key=len, default=None)
    if suffix is None:
        return word
    before = word.removesuffix(suffix)
    fits = _measure(before) >= least and (suffix != "ion" or before.endswith(("s", "t")))
    return before + table[suffix] if fits else word


def _shape(word: str) -> str:
    """c or v for each letter; y is a vowel after a consonant."""
    shape = ""
    for letter in word:
        shape += "v" if letter in "aeiou" or (letter == "y" and shape.endswith("c")) else "c"
    return shape


def _measure(word: str) -> int:
    """How often consonants follow vowels."""
    return len(re.findall("v+c", _shape(word)))


def _is_short(word: str) -> bool:
    """Whether it ends in consonant, vowel, consonant, and the last is none of w, x, y."""
    return _shape(word).endswith("cvc") and word[-1] not in "wxy"
