"""The sweep of block sizes with invented times, for which alone it needs a GPU."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from neo_megatron.model import compiled


@pytest.fixture
def sweep(monkeypatch):
    from neo_megatron.megatron_compat import cpu_platform

    cpu_platform.install()
    import sweep_flex_attention

    monkeypatch.setattr(compiled, "GRAPHS", compiled.GRAPHS)
    return sweep_flex_attention


def test_without_a_gpu_the_tool_reports_it(sweep, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep_flex_attention.py"])
    with pytest.raises(SystemExit, match="this machine has no GPU"):
        sweep.main()


def test_the_current_choice_comes_first_then_the_fastest(sweep, monkeypatch, capsys, tmp_path):
    properties = SimpleNamespace(name="H100", major=9, minor=0, shared_memory_per_block_optin=227 * 1024)
    heads = torch.zeros(256, 1, 1, 1, requires_grad=True)
    inputs = SimpleNamespace(query=heads, key=heads, value=heads, gradient=torch.zeros(256, 1, 1, 1), scale=1.0)
    zeros = torch.zeros(1, 256, dtype=torch.int32)
    timed = []

    def attend(query, key, value, mask, scale):
        if mask.options["fwd_BLOCK_M"] == 32:
            raise RuntimeError("out of resource: shared memory")
        timed.append(mask.options)
        return query * 1

    def seconds(work):
        work()
        options = timed[-1]
        backward = 1 / options["bwd_BLOCK_N1"] if torch.is_grad_enabled() else 0
        return 1 / (options["fwd_BLOCK_N"] * options["fwd_num_warps"]) + backward

    monkeypatch.setattr(sys, "argv", ["sweep", "--seq-length", "256", "--out", str(tmp_path / "times.json")])
    for name, stand_in in (("attend", attend), ("kernel_seconds", seconds)):
        monkeypatch.setattr(sweep, name, stand_in)
    monkeypatch.setattr(sweep, "draw_packs", lambda *_: [{"document": zeros, "image": zeros - 1}])
    monkeypatch.setattr(sweep.AttentionInputs, "draw", lambda *_: inputs)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    sweep.main()
    # Two blocks of queries of one causal document see three blocks of keys: 3 * 128 * 128 of 256 * 257 / 2 pairs.
    out = capsys.readouterr().out
    assert "blocks compute 1.49 times the allowed pairs" in out
    forward = out.split("forward: ")[1].splitlines()
    assert "of" in forward[0] and not forward[0].startswith("0 ")
    assert "fwd_BLOCK_M=128 fwd_BLOCK_N=64 fwd_num_stages=2 fwd_num_warps=8" in forward[1]  # what is in use
    assert "fwd_BLOCK_N=128" in forward[2] and "fwd_num_warps=8" in forward[2]
    rows = json.loads((tmp_path / "times.json").read_text())
    assert any(row["seconds"] is None for row in rows["forward"]) and all(row["seconds"] for row in rows["backward"])
