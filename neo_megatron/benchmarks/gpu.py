"""Benchmarks a GPU: steps of NEO next to the exported model, the attention kernel alone, and a profile.

Without a GPU the same runs at a tiny size; figures that need one are listed as not run.
"""

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from neo_megatron.benchmarks import gpu_kernels, gpu_report
from neo_megatron.benchmarks.gpu_jobs import Job, run_jobs
from neo_megatron.benchmarks.gpu_steps import ON_CPU, ON_GPU, as_record, measure_steps

# No process starts after so many seconds: everything has to be done in eight minutes. A process starts by importing,
# while the one before it measures, so that two runs are still unfinished then.
LAST_START = 390

PRODUCT_SIDE = {True: 8192, False: 256}


def measure(scratch: Path, parts: Sequence[str], out: Path | None) -> str:
    """Runs everything, writes ``out`` whenever something is added, and returns the tables."""
    start, on_gpu = time.monotonic(), torch.cuda.is_available()
    scale = ON_GPU if on_gpu else ON_CPU
    # Compiled once, and reused by later processes.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "inductor"))
    (scratch / "config.json").write_text(json.dumps(scale.sizes.to_hf()))
    results: dict[str, Any] = {"machine": _machine(), "on_gpu": on_gpu, "ceilings": {}, "attention": [], "steps": []}

    def write() -> None:
        results["seconds"] = round(time.monotonic() - start)
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(results, indent=1) + "\n")

    settings = {"sizes": scale.sizes, "lengths": scale.lengths if "attention" in parts else (), "shrunk": scale.shrunk}
    kernels = Job("kernels", gpu_kernels.prepare, gpu_kernels.run, {"side": PRODUCT_SIDE[on_gpu], **settings})
    for _, reports in run_jobs([kernels], scratch):
        results["ceilings"], *results["attention"] = reports
        write()
        print(f"{results['seconds']} s: kernels done", file=sys.stderr, flush=True)
    if "steps" in parts:
        memory = results["ceilings"].get("memory")
        for run, report in measure_steps(scale, memory, scratch, last_start=start + LAST_START):
            results["steps"].append(as_record(run, report))
            write()
    write()
    return gpu_report.markdown(results)


def _machine() -> dict[str, str]:
    """Machine and versions of the figures; asks the driver only, so that this process takes no GPU memory."""
    named = {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
    for package in ("torch", "triton", "transformers", "megatron-core", "transformer_engine"):
        try:
            named[package] = version(package)
        except PackageNotFoundError:
            named[package] = "not installed"
    return named
