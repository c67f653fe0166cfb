"""Multiple-choice questions, as two benchmarks ask them: options under letters, one letter as the answer."""

import re
from collections.abc import Sequence

from jstream.data.sources.clip import Event, Question

LETTERS = "ABCDEFGH"
INSTRUCTION = "Answer with the letter of the right option."

JOINED = "an option in pieces: joined"
SORTED = "options not in order of their letters: sorted"
LETTERED = "options without letters: lettered"
TWICE = "two options have the same letter"
NO_OPTION = "the answer is none of the options"

_LETTER = re.compile(r"\s*([A-H])[.:)]\s*")


def choice(question: str, options: Sequence[str], answer: str, time: float, repairs: Sequence[str] = ()) -> Question:
    """A question with its options, answered at once with a letter.

    Args:
        options: with or without their letters.
        answer: a letter.
        time: seconds at which it is asked.
        repairs: what was mended before.
    """
    by_letter, rules = _lettered(options)
    fault = "" if answer in by_letter else NO_OPTION if by_letter or not options else TWICE
    lines = [question.strip(), *(f"{letter}. {option}" for letter, option in sorted(by_letter.items())), INSTRUCTION]
    text = "\n".join(lines) if question.strip() else ""
    return Question(text, time, (Event(answer, None, time),), (*repairs, *rules), fault)


def _lettered(options: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options by their letters, and how they were mended; none where a letter stands twice."""
    found = [_LETTER.match(option) for option in options]
    letters = [match[1] for match in found if match]
    if len(letters) < 2:  # none has one, but "A.Lebrun" may look so
        bare = [option[match.end() :] if match else option for option, match in zip(options, found)]
        return dict(zip(LETTERS, map(str.strip, bare))), [LETTERED]
    if len(set(letters)) < len(letters) or not found[0]:
        return {}, []
    by_letter: dict[str, str] = {}
    letter = ""
    for option, match in zip(options, found):
        letter = match[1] if match else letter
        piece = option[match.end() :] if match else option
        by_letter[letter] = f"{by_letter.get(letter, '')} {piece}".strip()
    rules = [JOINED] * (len(letters) < len(options)) + [SORTED] * (letters != sorted(letters))
    return by_letter, rules
