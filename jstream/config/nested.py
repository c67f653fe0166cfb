"""From nested mappings to frozen dataclasses, strictly, and back."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from jstream.config.checks import ConfigError
from jstream.config.model import QWEN_TOWERS, QwenVisionConfig, SiglipConfig, VisionConfig


def from_dict(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Builds the frozen dataclass `cls` from nested mappings, strictly.

    Raises:
        ConfigError: an unknown key (names the nearest known one), a missing key or a value of the wrong type.
    """
    where = where or cls.__name__
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object, found {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            raise ConfigError(
                f"{where}: unknown key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(hints)}")
            )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if hint == VisionConfig:  # which of them, the value says itself
        named = value.get("tower") if isinstance(value, Mapping) else getattr(value, "tower", None)
        hint = QwenVisionConfig if named in QWEN_TOWERS else SiglipConfig
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, typing.cast(type, hint)) else from_dict(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}: expected a list, found {value!r}")
        kinds = [items[0]] * len(value) if len(items) == 2 and items[1] is Ellipsis else list(items)
        if len(kinds) != len(value):
            raise ConfigError(f"{where}: expected {len(kinds)} values, found {value!r}")
        return tuple(
            _convert(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, types.UnionType) or not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of `from_dict`: nested dicts and lists that JSON can hold."""
    return dataclasses.asdict(config)
