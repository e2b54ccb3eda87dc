"""One process needs no launcher, and one of several is told what it lacks."""

import os

import pytest

from neo_megatron.errors import ConfigError
from neo_megatron.run.start import LAUNCHER_VARIABLES, stand_alone


@pytest.fixture
def environment(monkeypatch):
    """Sets exactly these variables of a launcher; what is set later is taken back."""

    def set_variables(**variables: str) -> None:
        for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID"):
            monkeypatch.setenv(name, variables.get(name, ""))
            if name not in variables:
                monkeypatch.delenv(name)

    return set_variables


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "", "RANK": ""},
        {"MASTER_ADDR": "node17.of.an.earlier.job"},
        {"MASTER_ADDR": "node17", "MASTER_PORT": "6000"},
        {"SLURM_NTASKS": "8"},  # the shell of salloc
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # the script of sbatch
        {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun of one
    ],
)
def test_one_process_trains_alone(environment, variables):
    environment(**variables)
    stand_alone([])
    told = {name: os.environ[name] for name in LAUNCHER_VARIABLES}
    assert int(told.pop("MASTER_PORT")) > 1023
    assert told == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


def test_the_one_process_of_a_launcher_keeps_its_address(environment):
    launcher = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}
    environment(**launcher)
    stand_alone([])
    assert {name: os.environ[name] for name in LAUNCHER_VARIABLES} == launcher


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE=2 says that .* there is no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start",
        ),
        ({"RANK": "1"}, "RANK=1 says that .* there is no WORLD_SIZE, LOCAL_RANK"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node17", "MASTER_PORT": "6000"},
            "RANK=1 and WORLD_SIZE=4 says that .* there is no LOCAL_RANK: start them with python -m",
        ),
        (
            {name: "4" for name in LAUNCHER_VARIABLES},
            "RANK=4 is not one of the WORLD_SIZE=4 processes",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number of processes"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "srun has started 8 processes"),
    ],
)
def test_a_process_of_several_is_told_which_variables_are_missing(environment, variables, sentence):
    environment(**variables)
    with pytest.raises(ConfigError, match=sentence):
        stand_alone([])


def test_a_dry_run_looks_for_all_ranks_on_one_process(environment):
    environment(WORLD_SIZE="1024")
    stand_alone(["--dry-run"])
    assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "1024" and "MASTER_ADDR" not in os.environ
