"""Imports go one way: a module imports packages that stand before its own in this list, and there is no cycle.

`docs/architecture.md` shows the same order as a diagram.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.paths import ROOT

# Packages and single modules of neo_megatron, lowest first; those of one row do not import each other.
LAYERS = [
    ["errors"],
    ["redaction", "checked_files", "checked_pickles", "packages", "processes", "locks", "atomic_files"],
    ["paths", "worker_pool"],
    ["command_line", "storage", "megatron_compat"],
    ["data"],
    ["model"],
    ["hf", "presets"],
    ["checkpoint"],
    ["arguments", "validation"],
    ["planning"],
    ["inspection", "parity", "run"],
    ["inference", "pretrain_neo"],
    ["demo", "follow", "lmms_eval_plugin", "vllm_plugin", "launch"],
    ["benchmarks"],
    ["cli"],
    ["__main__"],
]
# The same within `data`.
DATA_LAYERS = [
    ["tags", "permutation", "image_limits", "memory_limit", "config", "tokenizer_checks"],
    ["conversation", "image", "manifest_schema"],
    ["chat", "video", "manifest"],
    ["rejects", "tokenizer_process"],
    ["shards"],
    ["packs", "prepare"],
    ["dataset"],
    ["verify"],
]


@cache
def modules() -> dict[str, Path]:
    files = sorted((ROOT / "neo_megatron").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file: Path) -> Iterator[str]:
    """Names of the modules that a file imports anywhere; for this package, also modules imported from a package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module


def own_imports(name: str) -> set[str]:
    return {it for it in imported(modules()[name]) if it.partition(".")[0] == "neo_megatron"} - {name}


@pytest.mark.parametrize(("prefix", "layers"), [("neo_megatron", LAYERS), ("neo_megatron.data", DATA_LAYERS)])
def test_imports_follow_the_order_of_packages(prefix, layers):
    rank = {part: number for number, row in enumerate(layers) for part in row}
    depth = prefix.count(".") + 1

    def part(name: str) -> str | None:
        """The part of the package that a module belongs to; None for one outside it, and for the package itself."""
        return name.split(".")[depth] if name.startswith(f"{prefix}.") else None

    unknown = {part(name) for name in modules()} - rank.keys() - {None}
    assert not unknown, "add them to the list, at their place"
    wrong = [
        f"{name} imports {other}"
        for name in modules()
        for other in own_imports(name)
        if part(name) and part(other) and part(name) != part(other) and rank[part(other)] >= rank[part(name)]
    ]
    assert not wrong


def test_imports_have_no_cycle():
    graph = {name: own_imports(name) & modules().keys() for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("package", ["neo_megatron.data", "neo_megatron.storage"])
def test_data_needs_no_model_and_no_megatron(package):
    """`data` prepares on machines without Megatron; torch and transformers are imported only where they are needed."""
    for name in modules():
        if name.startswith(package):
            for other in imported(modules()[name]):
                assert other.partition(".")[0] not in ("megatron", "transformer_engine"), name
                assert not other.startswith(("neo_megatron.model", "neo_megatron.checkpoint", "neo_megatron.run")), name


def test_the_model_reads_no_file():
    for name, file in modules().items():
        if name.startswith("neo_megatron.model"):
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            calls = [call for call in calls if ast.unparse(call) != "tl.load"]  # Triton's, of memory
            named = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
            assert not named & {"open", "read_text", "read_bytes", "read_json", "load", "safe_open"}, name


def foreign_names(tree: ast.Module) -> set[str]:
    """Names under which a file knows modules, classes and functions of torch, Megatron and transformers."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known = [(alias.name, alias.asname or alias.name.partition(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            known = [(node.module or "", alias.asname or alias.name) for alias in node.names]
        else:
            continue
        names |= {name for module, name in known if module.partition(".")[0] in ("torch", "megatron", "transformers")}
    return names


def changed(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """(first name of the target, line) of assignments to attributes; changing a library's settings is not patching."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr":
            targets = [ast.Attribute(node.args[0], "")]
        else:
            targets = [it for it in getattr(node, "targets", []) if isinstance(it, ast.Attribute)]
        for target in targets:
            attributes = []
            while isinstance(target, ast.Attribute):
                attributes.append(target.attr)
                target = target.value
            if isinstance(target, ast.Name) and not {"config", "backends"} & set(attributes):
                yield target.id, node.lineno


def test_only_one_package_patches_others():
    patches = 0
    for name, file in modules().items():
        tree = ast.parse(file.read_text())
        found = [line for owner, line in changed(tree) if owner in foreign_names(tree)]
        patches += len(found)
        assert not found or name.startswith("neo_megatron.megatron_compat"), f"{name}, lines {found}"
    assert patches
