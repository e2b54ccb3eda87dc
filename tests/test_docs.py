"""README and docs/: links, anchors, command lines and the table of tests agree with the repository."""

import ast
import re
import shlex
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

from neo_megatron.cli.commands import COMMANDS

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
MOST_WORDS = 1300
FLAG = r"--[a-z][\w-]*"


def text_of(page: Path) -> str:
    """A page without its fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"(?ms)^```.*?^```", "", page.read_text())


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(path, anchor) of every relative link, of which one part may be empty."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", text_of(page))):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page, made from its headings as GitHub does."""
    found: set[str] = set()
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", text_of(page)):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", plain).strip().lower().replace(" ", "-")
        number = sum(it == anchor or re.fullmatch(rf"{re.escape(anchor)}-\d+", it) is not None for it in found)
        found.add(f"{anchor}-{number}" if number else anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_anchors(page):
    wrong = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(f"{path}#{anchor}")
    assert not wrong


def test_pages_have_links():
    assert len(list(links(README))) > 15 and "known-limits" in anchors(DOCS / "compatibility.md")


def shell_lines(page: Path) -> Iterator[str]:
    """The lines of shell blocks, each with what a backslash continues."""
    for block in re.findall(r"(?ms)^```(?:bash|sh|shell|text)\n(.*?)^```", page.read_text()):
        if not block.lstrip().startswith("usage:"):
            yield from re.sub(r"\\\n\s*", "", block).splitlines()


def commands(page: Path) -> list[list[str]]:
    """The words of every command line that starts with `neo-megatron`."""
    lines = (line.strip() for line in shell_lines(page))
    return [shlex.split(line, comments=True) for line in lines if line.startswith("neo-megatron ")]


@cache
def flags_of(command: str) -> frozenset[str]:
    """The flags in docs/commands.md, which tests/cli/test_commands_page.py keeps up to date."""
    sections = re.split(r"(?m)^## ", (DOCS / "commands.md").read_text())
    (section,) = [it for it in sections if it.startswith(f"{command}\n")]
    found = set(re.findall(FLAG, section))
    if command == "pretrain":  # Megatron's flags have a page of their own
        rows = re.findall(rf"(?m)^\| `({FLAG})` \| ([\w ]+?) \|", (DOCS / "flags.md").read_text())
        found |= {flag for flag, verdict in rows if verdict != "rejected"}
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_name_commands_and_their_flags(page):
    wrong = []
    for _, command, *words in commands(page):
        if command not in COMMANDS:
            wrong.append(command)
            continue
        given = {word.partition("=")[0] for word in words if re.match(FLAG, word)}
        wrong += [f"{command} {flag}" for flag in sorted(given - flags_of(command) - {"--help"})]
    assert not wrong


def test_there_are_command_lines():
    assert sum(len(commands(page)) for page in PAGES) > 20
    assert {"--seq-length", "--held-out"} <= flags_of("pack") and "--prompt" not in flags_of("pack")


def test_subcommands_of_convert_exist():
    known = set(re.findall(r"usage: neo-megatron convert ([a-z0-9-]+)", (DOCS / "commands.md").read_text()))
    used = {words[2] for page in PAGES for words in commands(page) if words[1] == "convert"}
    assert len(used) >= 3 and used <= known


def test_the_readme_is_short():
    assert len(README.read_text().split()) <= MOST_WORDS


def test_the_readme_has_the_two_commands():
    lines = [line.partition("#")[0].strip() for line in shell_lines(README)]
    assert {"bash examples/quickstart/run.sh", "bash tests/run.sh"} <= set(lines)


def test_every_page_is_linked_from_the_readme_or_the_site():
    listed = README.read_text() + (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name not in listed] == []


def elsewhere() -> list[tuple[str, str]]:
    """(module or pattern, test file) of the table in docs/architecture.md."""
    section = (DOCS / "architecture.md").read_text().partition("## Tests of each module")[2]
    rows = re.findall(r"(?m)^\| (`.+`.*) \| `(tests/[\w/]+\.py)` \|$", section)
    return [(module, test) for modules, test in rows for module in re.findall(r"`([\w/*]+\.py)`", modules)]


def test_every_module_has_a_test_file():
    rows = elsewhere()
    assert len(rows) > 50
    assert sorted({test for _, test in rows if not (ROOT / test).is_file()}) == []
    package = ROOT / "neo_megatron"
    modules = [file.relative_to(package) for file in package.rglob("*.py") if ast.parse(file.read_text()).body[1:]]
    names = {str(module) for module in modules}
    assert [row for row, _ in rows if "*" not in row and row not in names] == []
    missing = [
        str(module)
        for module in modules
        if module.name != "__init__.py"
        and not (ROOT / "tests" / module.parent / f"test_{module.name}").is_file()
        and not any(fnmatchcase(str(module), row) for row, _ in rows)
    ]
    assert missing == []
