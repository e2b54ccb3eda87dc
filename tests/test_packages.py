"""Every installation hint names an extra of setup.py, or a package that setup.py requires."""

import re

import pytest
from packaging.requirements import Requirement
from support.setup_py import ROOT, setup_requirements

from neo_megatron.packages import OPTIONAL, install

SOURCES = [
    path
    for folder in ("neo_megatron", "tools", "examples", "docs")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".sh", ".md", ".html", ".sbatch")
    and "out" not in path.relative_to(ROOT).parts
    and path.name != "environment.sh"
] + [ROOT / "README.md"]
# Asked for in hints alone: what no extra brings.
ALONE = {"flash-attn-4", "gradio", "vllm"}


INSTALLED, EXTRAS = setup_requirements()
REQUIREMENTS = [*INSTALLED, *(text for extra in EXTRAS.values() for text in extra)]


def hints() -> list[tuple[str, str]]:
    """(file, what pip is to install) of every hint in sources and docs."""
    return [
        (str(path.relative_to(ROOT)), words)
        for path in SOURCES
        for match in re.finditer(r"pip install ((?:-[\w-]+ )*(?:'[^']+'|[\w.\[\]-]+)(?: '[^']+')*)", path.read_text())
        for words in re.findall(r"'([^']+)'|(?<!-)\b([\w.-]+\[?[\w-]*\]?)", re.sub(r"(^| )-[\w-]+", "", match[1]))
        for words in [words[0] or words[1]]
        if "{" not in words
    ]


def test_there_are_hints():
    assert len(hints()) > 8


@pytest.mark.parametrize(("file", "words"), sorted(set(hints())))
def test_every_hint_names_an_existing_package(file, words):
    if extra := re.fullmatch(r"\.\[([\w,-]+)\]", words):  # of a checkout
        assert set(extra[1].split(",")) <= set(EXTRAS), file
        return
    if words == ".":
        return
    name = Requirement(words).name
    assert name in {Requirement(text).name for text in REQUIREMENTS} | ALONE, (file, words)
    assert name not in ("neo-megatron", "neo_megatron", "apex"), "on PyPI these are other projects, or none"


@pytest.mark.parametrize("module", sorted(set(OPTIONAL) - {"flash_attn"}))
def test_the_versions_are_those_of_the_extras(module):
    assert Requirement(OPTIONAL[module]) in map(Requirement, REQUIREMENTS)
    assert install(module) == f"pip install '{OPTIONAL[module]}'"
