"""Markers that follow from a test's place, so that no test file has to repeat them."""

from collections.abc import Iterable

import pytest

from support.paths import ROOT

# Beginnings of paths below the repository. Slow tests start training jobs, servers, browsers or other environments.
PLACES = {
    "distributed": ("tests/distributed/",),
    "gpu": ("tests/gpu/",),
    "slow": (
        "tests/distributed/",
        "tests/examples/",
        "tests/lmms_eval_plugin/",
        "tests/checkpoint/test_mutations",
        "tests/data/test_hostile_",
        "tests/hf/test_transformers_",
        "tests/planning/test_state",
        "tests/test_signals",
    ),
}


def add_markers(items: Iterable[pytest.Item]) -> None:
    """Marks each test by its place; called by `pytest_collection_modifyitems` of tests/conftest.py."""
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        for marker, beginnings in PLACES.items():
            if path.startswith(beginnings):
                item.add_marker(marker)
        if item.get_closest_marker("thorough"):
            item.add_marker("slow")
