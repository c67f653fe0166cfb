"""A prompt and its answer: one JSON object of a stated form, read strictly; a second try, and then a reason.

A refusal, text that is not the JSON asked for, and an answer that fails the caller's check are asked for once more with
another seed, which is another request to the cache. Then they are `Dropped`, with why.
"""

import base64
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jstream.data.synthesis.llm import Answer, Client, RequestError, Spent

_WORDS = {str: '"text"', bool: "true or false", float: "number"}


class Dropped(ValueError):
    """Something that cannot be used; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        task: the system message: what to do.
        given: the user message, with `{names}` for what differs.
        form: of the answer: names with str, bool, float, [form] for a list or another dict.
    """

    task: str
    given: str
    form: Mapping[str, Any]

    def messages(self, images: Sequence[tuple[str, bytes]] = (), **values: Any) -> list[dict[str, Any]]:
        """Args: images: JPEGs, each with the words in front of it."""
        task = f"{self.task}\n\nAnswer with one JSON object of this form and with nothing else: {_written(self.form)}"
        content: Any = self.given.format(**values)
        if images:
            content = [{"type": "text", "text": content}]
            for words, jpeg in images:
                url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
                content += [{"type": "text", "text": words}, {"type": "image_url", "image_url": {"url": url}}]
        return [{"role": "system", "content": task}, {"role": "user", "content": content}]

    def read(self, answer: Answer) -> dict[str, Any]:
        """The object that an answer holds.

        Raises:
            Dropped: it is none, or of another form.
        """
        if answer.refusal is not None:
            raise Dropped(f"refused: {_quoted(answer.refusal)}")
        if answer.cut:
            raise Dropped(f"cut off after {answer.tokens_out} tokens: {_quoted(answer.text)}")
        text = answer.text.strip()
        if text.startswith("```") and text.endswith("```") and "\n" in text:  # fenced, as many models cannot help
            text = text[text.index("\n") : -3]
        try:
            found = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            found = None
        if not _fits(found, self.form):
            raise Dropped(f"unparsable: expected {_written(self.form)}, found {_quoted(answer.text)}")
        return found  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class Ask:
    """Asks a client, every request with the same seed; `spent` is what it took so far."""

    client: Client
    seed: int = 0
    spent: Spent = dataclasses.field(default_factory=Spent)

    def __call__(
        self,
        prompt: Prompt,
        images: Sequence[tuple[str, bytes]] = (),
        check: Callable[[dict[str, Any]], str | None] = lambda found: None,
        **values: Any,
    ) -> dict[str, Any]:
        """What a prompt is answered.

        Args:
            images: for a model that sees: JPEGs, each with the words in front of it.
            check: says what is wrong with an answer of the right form, or None.
            values: of the prompt's names.

        Raises:
            Dropped: also where the endpoint will not take the request.
            LLMError: where it does not work at all.
        """
        messages, why = prompt.messages(images, **values), None
        for seed in (self.seed, self.seed + 1):
            try:
                found = prompt.read(self.client.complete(messages, self.spent, seed=seed))
                why = check(found)
                if why is None:
                    return found
            except RequestError as error:  # as it would be with any seed
                raise Dropped(str(error)) from None
            except Dropped as error:
                why = str(error)
        raise Dropped(str(why))

    def lines(self, prompt: Prompt, lines: Sequence[str], at_a_time: int = 30, **values: Any) -> list[str]:
        """As many lines as are given, by a prompt that takes and gives `lines`; some at a time."""
        made: list[str] = []
        for first in range(0, len(lines), at_a_time):
            part = lines[first : first + at_a_time]
            found = self(prompt, check=as_many(len(part), "lines"), lines=numbered(part), number=len(part), **values)
            made += [one_line(line) for line in found["lines"]]
        return made


def some(name: str) -> Callable[[dict[str, Any]], str | None]:
    """A check that a text is not empty."""
    return lambda found: None if found[name].strip() else f"expected text under {name!r}, found none"


def as_many(number: int, name: str) -> Callable[[dict[str, Any]], str | None]:
    """A check of a list's length."""
    return lambda found: None if len(found[name]) == number else f"expected {number} {name}, found {len(found[name])}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def numbered(lines: Sequence[str]) -> str:
    """Lines of text, each behind its number, from 1 on."""
    return "\n".join(f"{number}. {one_line(line)}" for number, line in enumerate(lines, start=1))


def _written(form: Any) -> str:
    if isinstance(form, Mapping):
        return "{" + ", ".join(f'"{name}": {_written(part)}' for name, part in form.items()) + "}"
    return f"[{_written(form[0])}, …]" if isinstance(form, list) else _WORDS[form]


def _fits(found: Any, form: Any) -> bool:
    if isinstance(form, Mapping):
        return isinstance(found, dict) and all(name in found and _fits(found[name], form[name]) for name in form)
    if isinstance(form, list):
        return isinstance(found, list) and all(_fits(part, form[0]) for part in found)
    if form is float:
        return isinstance(found, int | float) and not isinstance(found, bool) and abs(found) < 1e9
    return isinstance(found, form)


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _quoted(text: str) -> str:
    return repr(one_line(text)[:120])
