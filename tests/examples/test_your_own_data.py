"""The commands of docs/your_own_data.md run in order as they stand there, on photographs and captions made up here."""

import json
import os
import re
import subprocess
import sys

import numpy as np
from PIL import Image
from support.paths import ROOT

PAGE = ROOT / "docs" / "your_own_data.md"
PHOTOGRAPHS = 120  # so many that a tenth of them, drawn by their paths, is never none
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 70, 210)}


def write_photographs(folder):
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(PHOTOGRAPHS):
        colour = list(COLOURS)[number % len(COLOURS)]
        noise = draw.integers(0, 40, (90, 120, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg")
        (folder / f"{number:04}.txt").write_text(f"A {colour} wall.\n")


def commands() -> str:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    return "\n".join(["set -euo pipefail", *blocks])


def test_the_walk_ends_with_an_evaluation(tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, call in {"python": "", "neo-megatron": "-m neo_megatron"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {call} "$@"\n')
        (programs / name).chmod(0o755)
    room = tmp_path / "room"
    room.mkdir()
    write_photographs(room / "photos")
    variables = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        ["bash", "-c", commands()],
        cwd=room,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    scores = json.loads((room / "evaluation" / "scores.json").read_text())
    assert '"questions": 12' in json.dumps(scores), scores
    assert (room / "evaluation" / "report.html").stat().st_size > 1000
    assert (room / "packs-held-out" / "manifest.json").is_file()
    assert "validation loss" in done.stdout
