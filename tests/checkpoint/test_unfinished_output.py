"""The directory of a conversion: one writer at a time, and nothing of an interrupted one is left in it."""

import os

import pytest
from support.kills import in_child, kill_at_step

from neo_megatron.checkpoint.hf_directory import output_directory
from neo_megatron.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def write(output, name: str) -> None:
    with output_directory(output) as partial:
        (partial / "release").mkdir()
        (partial / "release" / name).write_text(name)


def test_only_one_process_writes_an_output(tmp_path):
    output = tmp_path / "out"
    with output_directory(output) as partial:
        (partial / "weights").write_text("1")
        with pytest.raises(DataError, match=f"another run is writing to {output}; wait until it ends"):
            write(output, "other")
    assert [path.name for path in output.iterdir()] == ["weights"]
    with pytest.raises(ValueError, match="exists already"):
        write(output, "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_same_command_succeeds_after_a_kill(tmp_path):
    output = tmp_path / "out"

    def killed() -> None:
        kill_at_step(1, before=True)
        write(output, "first")

    assert os.WIFSIGNALED(in_child(killed))
    assert not output.exists()
    write(output, "second")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "release", "second"]
