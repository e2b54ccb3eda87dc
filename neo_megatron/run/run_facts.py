"""Facts of a run that trackers keep with its scalars: commit, versions, packs, parallel layout and plan.

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
from neo_megatron.planning.packs import measure_packs
from neo_megatron.run.changes import identity_of_packs
from neo_megatron.run.planned import can_plan, gpu_to_plan_for, plan_of

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
    if args.train_data_path and can_plan(args):
        facts["plan"] = json.dumps(_planned(args))
    return facts


def _planned(args: Namespace) -> dict[str, str | float | bool]:
    """Needs of the run, to compare with its scalars."""
    gpu, _ = gpu_to_plan_for()
    plan = plan_of(args, measure_packs(args.train_data_path[0]), gpu)
    return {
        "gpu": gpu.name,
        "memory of the fullest rank (GB)": round(plan.needed / 1e9, 3),
        "fits": plan.fits,
        "seconds per step": float(f"{plan.time.seconds:.4g}"),
        "tokens per second per GPU": float(f"{plan.time.tokens_per_second:.4g}"),
        "MFU (%)": round(100 * plan.time.mfu, 1),
    }


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
