"""Exports on transformers 4.57; a file of its own, so that another process runs it."""

from .older_transformers import run_with


def test_the_suite_on_transformers_4_57():
    run_with("4.57")
