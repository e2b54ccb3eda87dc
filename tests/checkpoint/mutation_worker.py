"""Tries tools on mutated checkpoints, each in a fork with limits; prints what did not end in one sentence, as JSON.

    python mutation_worker.py hf|torch_dist CHECKPOINT HF_DIRECTORY SCRATCH EVERY

``EVERY`` n takes every n-th mutation of each kind of file.
"""

import json
import os
import random
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from mutations import Mutation, mutations

from neo_megatron import command_line
from neo_megatron.cli import convert as convert_checkpoint
from neo_megatron.cli import generate, preprocess, verify_checkpoint
from neo_megatron.paths import Wanted, check_flags
from neo_megatron.run import resume

SECONDS, BYTES = 60, 3 << 30
Tool = tuple[str, Callable[[], None], list[str]]


def main() -> None:
    form, checkpoint, hf, scratch, every = sys.argv[1], *map(Path, sys.argv[2:5]), int(sys.argv[5])
    torch.set_num_threads(1)
    preprocess.preprocess  # noqa: B018 - its imports are done
    tried, failed, ends = 0, [], Counter()
    chosen = mutations(checkpoint)
    random.Random(3).shuffle(chosen)  # so that a sample has some of every kind
    for mutation in chosen[::every]:
        tried += 1
        for tool in _tools(form, mutation.file, scratch / "mutated", hf, scratch / "output"):
            failed += _try(mutation, tool, checkpoint, scratch, ends)
    print(json.dumps({"tried": tried, "failed": failed, "ends": ends}))


def _tools(form: str, file: str, mutated: Path, hf: Path, output: Path) -> list[Tool]:
    def convert(*words: str | Path) -> Tool:
        return "convert_checkpoint", convert_checkpoint.main, [*map(str, words)]

    if form == "torch_dist":
        return [
            convert("megatron-to-hf", "--megatron", mutated, "--tokenizer", hf, "--output", output),
            convert("info", mutated),
            convert("extract-pre-buffer", "--neo", mutated, "--output", output),
            ("verify_checkpoint", verify_checkpoint.main, [str(hf), str(mutated)]),
            ("pretrain_neo", lambda: _start(mutated), []),
        ]
    words = ["--model", str(mutated), "--prompt", "a a a", "--max-new-tokens", "2"]
    answer = ("generate", generate.main, words)
    if "token" in file or file in ("vocab.json", "merges.txt", "generation_config.json"):
        return [answer]
    return [convert("hf-to-megatron", "--hf", mutated, "--output", output), convert("info", mutated), answer]


def _start(mutated: Path) -> None:
    """The checks of a training before Megatron loads."""
    from argparse import Namespace

    for flags in ({"load": str(mutated)}, {"pretrained_checkpoint": str(mutated)}):
        args = Namespace(**{"load": None, "save": None, "pretrained_checkpoint": None, "ckpt_step": None, **flags})
        path = resume.choose_checkpoint(args)
        if path is not None:
            resume.TorchDistDirectory(path).common_state()


def _try(mutation: Mutation, tool: Tool, checkpoint: Path, scratch: Path, ends: Counter[str]) -> list[str]:
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    shutil.copytree(checkpoint, scratch / "mutated")
    mutation.apply(scratch / "mutated")
    name, _, words = tool
    log = scratch / "log"
    child = os.fork()
    if child == 0:
        _run(tool, log)
    status = os.waitpid(child, 0)[1]
    said = log.read_text(errors="replace")
    what = f"{mutation.name}: {name} {words[:1]}: "
    if os.WIFSIGNALED(status):
        return [f"{what}ended by {signal.Signals(os.WTERMSIG(status)).name}: {said[-500:]}"]
    code, last = os.WEXITSTATUS(status), (said.strip().splitlines() or [""])[-1]
    ends["accepted" if code == 0 else "refused"] += 1
    if os.environ.get("SAY"):
        print(what, code, last[:300], file=sys.stderr)
    if "Traceback" in said or code not in (0, 1):
        return [f"{what}exit code {code}: {said[-1500:]}"]
    if code == 1 and (not last.startswith(f"{name}: ") or str(scratch) not in last or len(last) > 4200):
        return [f"{what}not a sentence with the file: {last[:600]}"]
    return [f"{what}accepted"] if mutation.refused and code == 0 and _reads(mutation.file, name) else []


def _reads(file: str, tool: str) -> bool:
    """Whether a tool has a use for a file, so that it must refuse a wrong one."""
    return tool == "generate" or file in ("config.json", "model.safetensors") or not file.endswith((".json", ".txt"))


def _run(tool: Tool, log: Path) -> None:
    """In the fork: the tool as from a command line, within limits of time and memory."""
    name, tool_main, words = tool
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stderr = sys.__stderr__
    signal.alarm(SECONDS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    sys.argv = [name, *words]
    code = 1
    flags = {"--hf": Wanted.NEO, "--neo": Wanted.EITHER_FORM, "--megatron": Wanted.MEGATRON, "--model": Wanted.NEO}
    try:
        command_line.run(name, lambda: (check_flags(words, flags), tool_main()))
        code = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
