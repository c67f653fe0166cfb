"""The rules of the house, kept over the syntax trees: who may import whom, and what no file may do."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jstream"

COMMANDS = {
    "train",
    "features",
    "stream",
    "evaluate",
    "convert",
    "bench",
    "serve",
    "__main__",
}  # with `__main__.py` in any room

# A room is a file or a folder directly in jstream/; beside it the rooms it may import. Commands may import every room,
# and nothing imports a command. `__init__` is the public face, which is what `import jstream` reaches.
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "accelerators": set(),
    "sharding": {"config"},
    "models": {"config", "sharding"},
    "protocols": {"config", "data"},
    "data": {"config", "protocols"},
    "model": {"config", "protocols"},
    "streaming": {"config", "model", "models", "protocols", "data", "sharding"},
    "weights": {"config", "model", "models", "protocols", "sharding"},
    "training": {"accelerators", "config", "models", "protocols", "data", "weights", "sharding"},
    "evals": {"config", "model", "models", "protocols", "data", "streaming", "weights", "sharding", "__init__"},
    "serving": {"config", "model", "models", "protocols", "data", "streaming", "weights", "sharding", "__init__"},
    "benchmarks": {
        "accelerators",
        "config",
        "data",
        "model",
        "models",
        "protocols",
        "sharding",
        "streaming",
        "training",
        "weights",
        "__init__",
    },
    "assets": set(),
    "__init__": {"config", "data", "model", "models", "sharding", "streaming", "weights"},
}
for rooms in MAY_IMPORT.values():
    rooms.add("errors")
MAY_IMPORT["command"] = set(MAY_IMPORT)  # what commands share, for them alone
MAY_IMPORT |= {name: set(MAY_IMPORT) for name in COMMANDS}

MAX_LINES = 550
VAGUE_NAMES = {"utils.py", "helpers.py", "common.py"}
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: pathlib.PurePath) -> str:
    """`models/cache.py` and `models/__init__.py` lie in `models`, `config.py` in `config`."""
    return path.parts[0] if len(path.parts) > 1 and path.stem != "__main__" else path.stem


def imported_rooms(source: str, path: pathlib.PurePath) -> list[tuple[int, str]]:
    """(line, room) of each import of jstream, wherever it stands, in a file at `path` relative to the package."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("jstream", *path.parent.parts)
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "jstream" else [base]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "jstream":
                room = rest.partition(".")[0]
                found.append((node.lineno, room if room in MAY_IMPORT else "__init__"))
    return found


def unsafe_calls(source: str) -> list[tuple[int, str]]:
    """(line, name) of what can run code hidden in untrusted data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [(node.lineno, a.name) for a in names if a.name.partition(".")[0] in UNSAFE_MODULES]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNSAFE_MODULES:
                found.append((node.lineno, module))
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                found.append((node.lineno, f"{name}()"))
            case ast.Call(func=ast.Attribute(ast.Name("yaml"), "load" | "load_all" | "unsafe_load" as name)):
                found.append((node.lineno, f"yaml.{name}()"))
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg == "allow_pickle" and getattr(keyword.value, "value", None) is not False:
                    found.append((node.lineno, "allow_pickle"))
    return found


@pytest.mark.smoke
def test_every_room_imports_only_what_lies_below_it():
    wrong = []
    for file in FILES:
        path = file.relative_to(PACKAGE)
        room = room_of(path)
        if room not in MAY_IMPORT:
            wrong.append(f"jstream/{path}: {room!r} is not a room of the table in tests/test_imports.py")
            continue
        for line, imported in imported_rooms(file.read_text(encoding="utf-8"), path):
            if imported != room and imported not in MAY_IMPORT[room] - COMMANDS:
                allowed = ", ".join(sorted(MAY_IMPORT[room] - COMMANDS)) or "no other room"
                wrong.append(f"jstream/{path}:{line} imports {imported!r}; {room!r} may import {allowed}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_file_can_run_code_hidden_in_data():
    wrong = [
        f"jstream/{f.relative_to(PACKAGE)}:{line} {what}" for f in FILES for line, what in unsafe_calls(f.read_text())
    ]
    assert not wrong, "\n" + "\n".join(wrong)


def test_no_file_has_a_vague_name_or_more_than_one_concept():
    wrong = [f"jstream/{f.relative_to(PACKAGE)}: name the concept in it" for f in FILES if f.name in VAGUE_NAMES]
    for file in FILES:
        lines = len(file.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            wrong.append(f"jstream/{file.relative_to(PACKAGE)}: {lines} lines, expected at most {MAX_LINES}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("statement", "rooms"),
    [
        ("import jstream", ["__init__"]),
        ("from jstream import load", ["__init__"]),
        ("from jstream import models, config", ["models", "config"]),
        ("import jstream.training.step as step", ["training"]),
        ("def f():\n    from jstream.streaming.session import Session", ["streaming"]),
        ("from . import rope", ["models"]),
        ("from .. import training", ["training"]),
        ("from ..streaming.event import Event", ["streaming"]),
        ("from jstream.train import main", ["train"]),
        ("import jax.numpy as jnp\nimport jstreamer", []),
    ],
)
def test_the_rules_see_every_form_of_import(statement, rooms):
    assert [room for _, room in imported_rooms(statement, pathlib.PurePath("models/cache.py"))] == rooms


@pytest.mark.parametrize(
    "statement",
    ["import pickle", "from pickle import loads", "eval('1')", "yaml.load(f)", "np.load(f, allow_pickle=True)"],
)
def test_the_rules_see_unsafe_calls(statement):
    assert len(unsafe_calls(statement)) == 1


def test_the_rules_let_safe_calls_pass():
    assert not unsafe_calls(
        "import jax\njax.eval_shape(f)\nmodel.eval()\nnp.load(f, allow_pickle=False)\nyaml.safe_load(f)"
    )
