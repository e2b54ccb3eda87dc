"""Tiles of attention: which are chosen, when they are timed, what a file keeps. A fake timer stands in for a GPU."""

import json
from argparse import Namespace
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend

from neo_megatron import presets
from neo_megatron.model import core_attention
from neo_megatron.model.flex_kernel import KIB, Widths, choices_to_time, one_direction
from neo_megatron.run import attention_tiles
from neo_megatron.run.attention_tiles import AttentionTiles, Kernel, choose

KERNEL = Kernel("NVIDIA H100 80GB HBM3", "9.0", 256, 128, "bfloat16", "2.11.0+cu128", "3.6.0")
CHOICES = choices_to_time(Widths(256, 128), (9, 0), 227 * KIB)
# Seconds of forward and backward: the second choice has the fastest forward, the third the fastest backward.
SECONDS = [(3e-3, 9e-3), (1e-3, 8e-3), (2e-3, 7e-3)]
FASTEST = one_direction(CHOICES[1], "fwd") | one_direction(CHOICES[2], "bwd")


class Timer:
    def __init__(self, failing: tuple[int, ...] = ()):
        self.asked, self.failing = [], failing

    def __call__(self, options):
        number = CHOICES.index(options)
        self.asked.append(number)
        if number in self.failing:
            raise RuntimeError("out of resource: shared memory\nmore")
        return SECONDS[number]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_fastest_of_each_direction_is_kept_and_not_timed_again(home, capsys):
    timer = Timer()
    assert choose(KERNEL, CHOICES, timer) == FASTEST and timer.asked == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "timing choice 2 of 3, forward 128, 64; 3, 8 and backward 32, 64, 128, 32; 2, 8" in printed
    assert "choice 3: forward 2.000 ms, backward 7.000 ms" in printed
    assert "attention tiles: forward 128, 64; 3, 8 and backward 32, 64, 64, 32; 2, 8; timed, kept in" in printed
    (file,) = home.rglob("*.*")  # nothing else is left
    assert file == KERNEL.file and file.name == "NVIDIA-H100-80GB-HBM3-9.0-256-128-bfloat16-2.11.0-cu128-3.6.0.json"
    assert json.loads(file.read_text())["times"][1] == [CHOICES[1], *SECONDS[1]]
    assert choose(KERNEL, CHOICES, timer) == FASTEST and timer.asked == [0, 1, 2]
    assert "timed before, kept in" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["device", "capability", "dtype", "torch", "triton", "query_key", "value"])
def test_another_device_version_or_head_is_timed_for_itself(change):
    choose(KERNEL, CHOICES, Timer())
    timer = Timer()
    choose(replace(KERNEL, **{change: 64 if change in ("query_key", "value") else "other"}), CHOICES, timer)
    assert timer.asked == [0, 1, 2]
    choose(KERNEL, CHOICES, timer)
    assert timer.asked == [0, 1, 2]


OTHERS = "is of other choices of tiles"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "not JSON"),
        (b" " * (2 << 20), "such a file has at most"),
        ({"options": {"fwd_BLOCK_M": 16}}, OTHERS),  # tiles that nobody has compiled
        ({"options": {"BACKEND": "FLASH"}}, OTHERS),
        ({"options": None}, OTHERS),
        ({"choices": CHOICES[:2]}, OTHERS),
        ({"kernel": asdict(KERNEL) | {"torch": "2.10.0"}}, OTHERS),
    ],
)
def test_a_file_of_anything_else_is_named_and_made_again(content, reason, capsys):
    choose(KERNEL, CHOICES, Timer())
    right = KERNEL.file.read_bytes()
    if isinstance(content, dict):
        kept = json.loads(right)
        if content.get("options"):
            content["options"] = kept["options"] | content["options"]
        content = json.dumps(kept | content).encode()
    KERNEL.file.write_bytes(content)
    capsys.readouterr()
    timer = Timer()
    assert choose(KERNEL, CHOICES, timer) == FASTEST and timer.asked == [0, 1, 2]
    printed = capsys.readouterr().out
    assert "attention tiles: timing again, because" in printed and reason in printed and str(KERNEL.file) in printed
    assert KERNEL.file.read_bytes() == right


def test_a_directory_that_cannot_be_written_costs_the_file_only(home, monkeypatch, capsys):
    (home / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert choose(KERNEL, CHOICES, Timer()) == FASTEST
    assert "timed for this run only, because" in capsys.readouterr().out


def test_a_choice_that_does_not_run_is_left_out_but_the_table_must_run(capsys):
    assert choose(KERNEL, CHOICES, Timer(failing=(1,))) == CHOICES[2]
    assert "choice 2 does not run: out of resource: shared memory\n" in capsys.readouterr().out
    KERNEL.file.unlink()
    with pytest.raises(RuntimeError, match="out of resource"):
        choose(KERNEL, CHOICES, Timer(failing=(0,)))
    assert not KERNEL.file.exists()


def test_of_two_runs_at_once_both_take_the_tiles_of_the_first(capsys):
    def meanwhile(options):
        if not KERNEL.file.exists():
            other = Timer()
            assert choose(KERNEL, CHOICES, other) == FASTEST and other.asked == [0, 1, 2]
        return 1.0, 1.0  # by which this run would choose the table's

    assert choose(KERNEL, CHOICES, meanwhile) == FASTEST
    assert "another run has timed them meanwhile" in capsys.readouterr().out


@pytest.fixture
def run_on_gpu(monkeypatch):
    """The tiles of a run with these arguments on a GPU with 227 KiB of shared memory, and what was timed."""

    def tiles(capability=(9, 0), **changes):
        timer = Timer()
        properties = SimpleNamespace(
            name="NVIDIA H100", major=capability[0], minor=capability[1], shared_memory_per_block_optin=227 * KIB
        )
        monkeypatch.setattr(attention_tiles.cpu_platform, "on_cpu", lambda: False)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(attention_tiles, "GpuTimer", lambda *_: timer)
        return AttentionTiles(arguments(**changes)), timer

    return tiles


def arguments(size: str = "neo-2b", **changes) -> Namespace:
    given = dict(attention_backend=AttnBackend.auto, attention_tiles="timed", deterministic_mode=False)
    sizes = asdict(presets.SIZES[size])
    return Namespace(**given | {"params_dtype": torch.bfloat16, "neo_sizes": sizes} | changes)


def test_a_run_times_once_for_all_chunks_of_its_model(run_on_gpu, home):
    tiles, timer = run_on_gpu()
    assert tiles.options == FASTEST
    (file,) = home.rglob("*.json")
    assert file.name.startswith("NVIDIA-H100-9.0-256-128-bfloat16-")
    file.unlink()
    assert tiles.options == FASTEST and timer.asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(deterministic_mode=True), "not timed: --deterministic-mode"),
        (dict(attention_tiles="table"), "not timed: --attention-tiles table"),
        (dict(params_dtype=torch.float32), "not timed: the only choice"),
        (dict(size="tiny"), "not timed: the only choice"),
        (dict(capability=(12, 0)), "not timed: the only choice"),
        (dict(attention_backend=AttnBackend.flash), None),
        (dict(attention_backend=AttnBackend.unfused), None),
    ],
)
def test_nothing_is_timed_or_read_where_tiles_are_fixed(changes, said, run_on_gpu, home, capsys):
    run_on_gpu()[0].options  # noqa: B018 - leaves a file
    capsys.readouterr()
    tiles, timer = run_on_gpu(**changes)
    assert tiles.options is None and not timer.asked
    printed = capsys.readouterr().out
    assert said in printed if said else not printed


def test_a_cpu_has_no_tiles_to_time(home):
    assert AttentionTiles(arguments()).options is None and not list(home.iterdir())


def test_all_ranks_take_those_of_rank_0_unless_their_gpu_is_another(run_on_gpu, monkeypatch, caplog):
    asked = []

    def on_another_rank(action):
        asked.append(action)
        return kernel, CHOICES[1]

    kernel = Kernel("NVIDIA H100", "9.0", 256, 128, "bfloat16", torch.__version__, attention_tiles.triton.__version__)
    monkeypatch.setattr(attention_tiles, "on_rank_0", on_another_rank)
    tiles, timer = run_on_gpu()
    assert tiles.options == CHOICES[1] and not timer.asked and len(asked) == 1
    kernel = replace(kernel, device="NVIDIA H200")
    assert run_on_gpu()[0].options is None and "takes those of the table" in caplog.text


def test_the_timer_measures_both_directions_and_draws_from_no_shared_state(monkeypatch):
    """On a CPU, with a clock that advances by 1 ms for each forward and 3 ms for each backward, then 5 times slower."""

    class OnCpu(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            return function(*args, **kwargs | ({"device": "cpu"} if "device" in kwargs else {}))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.call = len(clock)
            clock.append(self)

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            assert other.call == self.call + 1
            return {0: 1.0, 1: 3.0}[self.call % 3] * (5 if self.call < 9 else 1)  # slow while it warms up

    def plain(query, key, value, kernel_options, **given):
        seen.append((kernel_options, query.shape, key.shape, value.shape))
        return value.repeat_interleave(2, dim=1) + key.mean() + query.mean()

    clock, seen, generator = [], [], torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(core_attention, "_compiled_flex_attention", lambda: plain)
    monkeypatch.setattr(attention_tiles, "TOKENS", 256)
    monkeypatch.setattr(attention_tiles, "DOCUMENT", 128)
    before = torch.get_rng_state()
    with OnCpu():
        found = attention_tiles.GpuTimer((32, 16), torch.float32)(CHOICES[0])
    assert found == (1e-3, 3e-3) and torch.equal(torch.get_rng_state(), before)
    assert seen == [(CHOICES[0], (1, 16, 256, 32), (1, 8, 256, 32), (1, 8, 256, 16))] * 13
