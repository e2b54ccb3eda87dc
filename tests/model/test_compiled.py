"""Functions that a GPU compiles are compiled once."""

from pathlib import Path

from support.processes import run_python


def test_other_packs_cause_no_recompilation():
    done = run_python(Path(__file__).parent / "compile_worker.py", environment={"TORCHDYNAMO_DISABLE": "0"})
    assert done.returncode == 0 and "one graph" in done.stdout, done.stdout[-3000:]
