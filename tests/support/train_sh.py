"""The command line that examples/train.sh would start."""

import os
import subprocess
from pathlib import Path

from support.paths import ROOT


def words_of_train_sh(size: str, stage: int, room: Path, *flags: str) -> list[str]:
    """With a stand-in for python that prints what it is given, on a machine that says it has eight GPUs.

    Args:
        room: directory for the stand-ins.
        flags: of the user.
    """
    for name, script in {"python": "printf '%s\\n' \"$@\"", "nvidia-smi": "seq 8"}.items():
        (room / name).write_text(f"#!/bin/sh\n{script}\n")
        (room / name).chmod(0o755)
    environment = {"PATH": f"{room}:{os.environ['PATH']}", "PACKS": "packs", "OUTPUT": "run"}
    script = ["bash", str(ROOT / "examples" / "train.sh"), size, str(stage), *flags]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
