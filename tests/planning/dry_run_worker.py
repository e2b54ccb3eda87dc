"""Runs `pretraining.train()` once for every job of a JSON list of {"argv", "world_size"}, in this one process.

The last line printed is the JSON list of what each printed and what it ended with: null, or the sentence of its exit.
"""

import contextlib
import gc
import io
import json
import os
import sys

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install_training()

from megatron.training import global_vars, training

from neo_megatron.run import pretraining


def run(job: dict) -> tuple[str, str | None]:
    os.environ.update(WORLD_SIZE=str(job["world_size"]), RANK="0")
    sys.argv = ["pretrain_neo", *job["argv"]]
    printed, end = io.StringIO(), None
    try:
        with contextlib.redirect_stdout(printed):
            pretraining.train()
    except SystemExit as stop:
        end = stop.code
    if global_vars._GLOBAL_SIGNAL_HANDLER:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    training.destroy_global_state()
    gc.collect()
    return printed.getvalue(), end


if __name__ == "__main__":
    print(json.dumps([run(job) for job in json.loads(sys.argv[1])]))
