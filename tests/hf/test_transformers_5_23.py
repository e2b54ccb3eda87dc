"""Exports on transformers 5.23; a file of its own, so that another process runs it."""

from .older_transformers import run_with


def test_everything_else():
    run_with("5.23")
