"""The one error of a configuration, and the check that most of them share."""

import dataclasses
from typing import Any

from jstream.errors import UserError


class ConfigError(UserError, ValueError):
    """A configuration that cannot be used; the message is one line."""


def require_positive(config: Any, where: str, but: tuple[str, ...] = ()) -> None:
    """Checks the whole numbers of a config: > 0, or ≥ 0 for those named in `but`."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 0 if field.name in but else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise ConfigError(f"{where}.{field.name}: expected a whole number ≥ {least}, found {value}")
