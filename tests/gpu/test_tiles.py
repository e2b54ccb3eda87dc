"""The tiles of attention that a run times at its first start: which are chosen, and that their numbers are right."""

from argparse import Namespace
from dataclasses import asdict

import pytest
import torch
from gpu.conftest import relative_error

from neo_megatron.model.flex_kernel import Widths, choices_to_time
from neo_megatron.presets import SIZES


def test_the_fastest_tiles_are_kept_and_compute_what_the_tables_do(gpu, tmp_path, monkeypatch, capsys):
    """Of NEO-2B in bf16. Prints the times of all choices."""
    from megatron.core.transformer.enums import AttnBackend

    from neo_megatron.run.attention_tiles import AttentionTiles, GpuTimer

    properties = torch.cuda.get_device_properties(gpu)
    capability, memory = (properties.major, properties.minor), properties.shared_memory_per_block_optin
    choices = choices_to_time(Widths(256, 128), capability, memory)
    if len(choices) < 2:
        pytest.skip(f"one choice of tiles is known for sm_{capability[0]}{capability[1]}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    args = Namespace(
        attention_backend=AttnBackend.auto,
        attention_tiles="timed",
        deterministic_mode=False,
        params_dtype=torch.bfloat16,
        neo_sizes=asdict(SIZES["neo-2b"]),
    )
    with capsys.disabled():
        print()
        chosen = AttentionTiles(args).options
    assert AttentionTiles(args).options == chosen
    assert "timed before, kept in" in capsys.readouterr().out
    timer = GpuTimer((256, 128), torch.bfloat16)
    for left, right in zip(timer.results(chosen), timer.results(choices[0]), strict=True):
        assert left.isfinite().all() and relative_error(left, right) < 1e-2
