"""Exports on transformers 5.23; a file of its own, so that another process runs it."""

import pytest

from .older_transformers import run_with


def test_caches_on_transformers_5_23():
    """5.24 renamed the cache; the rest of the suite runs on it and on 4.57."""
    run_with("5.23", "test_cache.py", "test_generation.py")


@pytest.mark.thorough
def test_the_suite_on_transformers_5_23():
    run_with("5.23")
