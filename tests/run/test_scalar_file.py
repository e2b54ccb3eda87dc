"""The run's own file of scalars, over starts that resume and files that are not its own."""

import json
import math
import os

import pytest

from neo_megatron.errors import DataError
from neo_megatron.run.scalar_file import NAME, ScalarFile


def steps(directory) -> list[int]:
    return [json.loads(line)["step"] for line in (directory / NAME).read_text().splitlines()]


def test_lines_are_json_whatever_the_numbers(tmp_path):
    ScalarFile(tmp_path / "saved", 0).write(3, {"lm loss": 2.5, "grad-norm": math.inf, "lm loss test": math.nan})
    line = json.loads((tmp_path / "saved" / NAME).read_text(), parse_constant=pytest.fail)
    assert line == {"step": 3, "lm loss": 2.5, "grad-norm": None, "lm loss test": None}


@pytest.mark.parametrize("cut", [0, 9], ids=["ended", "killed"])
def test_a_resumed_run_repeats_no_step(tmp_path, cut):
    """It was at step 6, whose line a kill may have cut, and its checkpoint is of step 4, which was evaluated."""
    first = ScalarFile(tmp_path, 0)
    for step in (1, 2, 3, 4, 4, 5, 6):
        first.write(step, {"lm loss": step})
    os.truncate(tmp_path / NAME, (tmp_path / NAME).stat().st_size - cut)
    resumed = ScalarFile(tmp_path, 4)
    for step in (5, 6, 7):
        resumed.write(step, {"lm loss": step})
    assert steps(tmp_path) == [1, 2, 3, 4, 4, 5, 6, 7]
    ScalarFile(tmp_path, 0).write(1, {"lm loss": 1})
    assert steps(tmp_path) == [1], "a new run"


@pytest.mark.parametrize("line", ["{}", "[1]", '{"step": "1"}', '{"step": true}', "step"])
def test_another_file_is_left_alone(tmp_path, line):
    (tmp_path / NAME).write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(DataError, match=f"{NAME}, line 2: not a line of scalars with a step; move the file away"):
        ScalarFile(tmp_path, 5)
    assert (tmp_path / NAME).read_text() == f'{{"step": 1}}\n{line}\n'


def test_a_run_goes_on_without_the_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    ScalarFile(tmp_path / "file", 0).write(1, {"lm loss": 1.0})
    assert "scalars.jsonl cannot be written (" in capsys.readouterr().out
