"""Docstrings for the reference: `width, height: …`, one line for several names, is read as a line for each of them.

An extension of griffe, which reads docstrings for mkdocstrings; without it such a line would name nothing that exists.
"""

import re

import griffe

SHARED = re.compile(r"    (\w+(?:, \w+)+):(?= |$)")


def one_line_each(docstring: str) -> str:
    """The docstring with a copy of each shared line, and of what belongs to it, for every name."""
    lines, section = docstring.splitlines(), False
    result: list[str] = []
    while lines:
        line = lines.pop(0)
        if re.match(r"\w", line):
            section = line in ("Args:", "Attributes:")
        shared = SHARED.match(line) if section else None
        if shared is None:
            result.append(line)
            continue
        rest = [line[shared.end() :]]
        while lines and re.match(r" {5}", lines[0]):
            rest.append(lines.pop(0))
        for name in shared[1].split(", "):
            result += [f"    {name}:{rest[0]}", *rest[1:]]
    return "\n".join(result)


class SharedLines(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = one_line_each(obj.docstring.value)
