"""Facts of a run that trackers keep with its scalars: commit, versions, packs and parallel layout.

The arguments of the run are not among them: Megatron gives them to TensorBoard and Weights & Biases itself.
"""

import json
import platform
import subprocess
from argparse import Namespace
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from neo_megatron.planning.layout import Layout, precision_of
from neo_megatron.run.changes import identity_of_packs

_PACKAGES = ("torch", "megatron-core", "transformers", "numpy")
_SECONDS = 10


def facts_of(args: Namespace) -> dict[str, str]:
    """Name -> text. The hash of packs covers their manifest and those of their shards; see `identity_of_packs`."""
    layout = Layout.from_arguments(args, precision_of(args))
    facts = {
        "git commit": git_commit(Path(__file__).parent),
        "versions/python": platform.python_version(),
        **{f"versions/{package}": version(package) for package in _PACKAGES},
        "layout": json.dumps(asdict(layout)),
    }
    for split in ("train", "valid", "test"):
        if paths := getattr(args, f"{split}_data_path"):
            identity = identity_of_packs(paths[0])
            facts[f"packs/{split}"] = identity if isinstance(identity, str) else json.dumps(identity)
    return facts


def git_commit(directory: Path) -> str:
    """The commit of the checkout that holds a directory, with ``, changed`` if it is not quite that; else "none"."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}, changed" if commit and git("status", "--porcelain", "-uno") else commit or "none"
    except (OSError, subprocess.TimeoutExpired):  # no git here, or a file system that hangs
        return "none"
