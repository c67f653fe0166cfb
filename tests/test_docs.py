"""What README and docs promise: links, anchors, files, flags and references that are there.

All of it is read from Markdown and syntax trees; nothing is imported and no site is built. That the site itself builds
without a warning is `mkdocs build --strict`.
"""

import ast
import functools
import pathlib
import re
from collections.abc import Iterator

import pytest
import yaml

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ROOTS = (REPOSITORY, REPOSITORY / "jstream")  # that files are named from
OUR_FOLDERS = {folder.name for root in ROOTS for folder in root.iterdir() if folder.is_dir()}
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [REPOSITORY / "README.md", *PAGES, REPOSITORY / "jstream/assets/tiny/README.md"]

FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?\)")
COMMAND = re.compile(r"python3? (?:-m (jstream[\w.]*)|(launch/\w+\.py))([^\n`]*)")
SHORT_COMMAND = re.compile(r"(?<![\w.])jstream ((?:data )?\w+)(?= --)")  # `jstream stream --…`, with the console script
NAMED_FILE = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|sh|yaml|ipynb|json|jsonl|mp4))`")
PLACEHOLDER = "BENCHMARK.py"
ABSL = {"help", "helpfull"}  # flags that every command has


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(REPOSITORY))


def prose(text: str) -> str:
    """Markdown without its fenced code."""
    return FENCE.sub("", text)


def links(text: str) -> list[str]:
    return LINK.findall(re.sub(r"`[^`\n]*`", "", prose(text)))


def slug(heading: str) -> str:
    """As code hosts and Python-Markdown make the anchor of a heading."""
    plain = re.sub(r"[*`]|\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


def anchors(text: str) -> set[str]:
    """Of headings, and of what a page of the reference documents."""
    headings = re.findall(r"^#{1,6} +(.*?) *$", prose(text), re.MULTILINE)
    return {*map(slug, headings), *re.findall(r"^::: +(\S+)", text, re.MULTILINE)}


def dead_links(path: pathlib.Path, text: str) -> list[str]:
    """Links of a document at `path` to files or headings that are not there."""
    dead = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = path.parent / target if target else path
        if not file.exists():
            dead.append(link)
        elif anchor and anchor not in anchors(text if file == path else file.read_text(encoding="utf-8")):
            dead.append(link)
    return dead


@functools.cache
def defined_flags(module: str) -> frozenset[str] | None:
    """Flags of a command by their DEFINE_… calls, those of `jstream.command` among them; None where there is none."""
    file = REPOSITORY / module if module.endswith(".py") else REPOSITORY / (module.replace(".", "/") + ".py")
    file = file if file.exists() else file.with_suffix("") / "__main__.py"
    if not file.exists():
        return None
    flags = set(ABSL)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        match node:
            case ast.Call(func=ast.Attribute(attr=str(call)), args=[ast.Constant(value=str(flag)), *_]):
                if call.startswith("DEFINE_"):
                    flags |= {flag, f"no{flag}"} if call == "DEFINE_bool" else {flag}
                elif call == "add_argument":
                    flags.add(flag.lstrip("-"))
            case ast.ImportFrom(module="jstream", names=names) if any(alias.name == "command" for alias in names):
                flags |= defined_flags("jstream.command") or set()
    return frozenset(flags)


def wrong_commands(text: str) -> Iterator[str]:
    """Commands of a document that do not exist, and flags that they do not have."""
    text = SHORT_COMMAND.sub(lambda found: f"python -m jstream.{found[1].replace(' ', '.')}", text)
    for module, script, rest in COMMAND.findall(re.sub(r"\\\n *", " ", text)):
        command = script or module.rstrip(".")
        if "…" in command or command == "jstream":
            continue
        flags = defined_flags(command)
        if flags is None:
            yield f"{command} is no command"
            continue
        words = re.sub(r"'[^']*'|\"[^\"]*\"", "x", re.split(r" -- | #|&&|\||;", rest)[0])  # values, and what follows
        for flag in re.findall(r"(?<=[ \[])--([A-Za-z]\w*)", words):
            if flag not in flags:
                yield f"{command} has no flag --{flag}"


def is_defined(identifier: str) -> bool:
    """Whether a dotted name is a module of ours, or is made or imported in one."""
    parts = identifier.split(".")
    for length in range(len(parts), 0, -1):
        base = REPOSITORY.joinpath(*parts[:length])
        file = next((f for f in (base.with_suffix(".py"), base / "__init__.py") if f.exists()), None)
        if file is None:
            continue
        if length == len(parts):
            return True
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.ClassDef(name=name) | ast.FunctionDef(name=name) if name == parts[length]:
                    return True
                case ast.ImportFrom(names=names) if any((a.asname or a.name) == parts[length] for a in names):
                    return True
        return False
    return False


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(path):
    assert dead_links(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_shown_has_the_flags_it_is_shown_with(path):
    assert list(wrong_commands(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_file_named_is_there(path):
    """By its path in the repository or in the package."""
    named = NAMED_FILE.findall(path.read_text(encoding="utf-8"))
    ours = [file for file in named if file.split("/")[0] in OUR_FOLDERS and not file.endswith(PLACEHOLDER)]
    assert [file for file in ours if not any((root / file).exists() for root in ROOTS)] == []


def test_every_page_stands_in_the_navigation_once():
    def pages(entry) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [page for value in (entry.values() if isinstance(entry, dict) else entry) for page in pages(value)]

    navigation = pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert sorted(navigation) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_page_links_to_nothing_outside_the_site(path):
    local = [link.partition("#")[0] for link in links(path.read_text(encoding="utf-8"))]
    outside = [
        link
        for link in local
        if link and not re.match(r"[a-z]+:", link) and not (path.parent / link).resolve().is_relative_to(DOCS)
    ]
    assert outside == []


def test_the_reference_names_what_exists_and_all_of_the_public_face():
    named = {name for page in PAGES for name in re.findall(r"^::: +(\S+)", page.read_text(encoding="utf-8"), re.M)}
    assert [name for name in sorted(named) if not is_defined(name)] == []
    face = ast.parse((REPOSITORY / "jstream/__init__.py").read_text(encoding="utf-8")).body
    public = next(ast.literal_eval(n.value) for n in face if isinstance(n, ast.Assign) and "__all__" in ast.dump(n))
    index = (DOCS / "api/index.md").read_text(encoding="utf-8")
    assert [name for name in public if f"jstream.{name}" not in index] == []


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](nowhere.md)", ["nowhere.md"]),
        ("[a](concepts.md#memory) [b](concepts.md#nowhere)", ["concepts.md#nowhere"]),
        ("# A *big* [word](index.md), `code`\n[a](#a-big-word-code) [b](#a)", ["#a"]),
        ("```bash\n# no heading\n[a](nowhere.md)\n```\n[b](#no-heading) `[c](nowhere.md)`", ["#no-heading"]),
        ("[a](https://example.org/nowhere.md) [b](api/data.md#jstream.data.annotations)", []),
    ],
)
def test_a_dead_link_is_found(text, dead):
    assert dead_links(DOCS / "index.md", text) == dead


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("python -m jstream.stream --video=a.mp4 --query='0:--what?' --norealtime --config.seed=1 | tee --x", []),
        ("python -m jstream.stream --vidoe=a.mp4", ["jstream.stream has no flag --vidoe"]),
        ("python -m jstream.convert --source=F \\\n    --form=hf", ["jstream.convert has no flag --form"]),
        ("`python -m jstream.streem`", ["jstream.streem is no command"]),
        ("python launch/aot.py --topology=h200 && other --flag", []),
        ("python -m jstream.data.world --out=F  # --x", []),
        (".venv/bin/jstream data world --oot=F", ["jstream.data.world has no flag --oot"]),
    ],
)
def test_a_flag_that_does_not_exist_is_found(text, wrong):
    assert list(wrong_commands(text)) == wrong
