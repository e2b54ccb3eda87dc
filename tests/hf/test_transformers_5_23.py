"""Exports on transformers 5.23; a file of its own, so that another process runs it."""

from .older_transformers import run_with


def test_the_suite_on_transformers_5_23():
    run_with("5.23")
