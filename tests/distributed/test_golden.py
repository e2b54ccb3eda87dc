"""The model equals the published one: activations, logits, losses and gradients, and the same numbers on every layout.

Tolerances are those of the reference numbers: activations 3e-5, logits 1e-4, losses 1e-5, gradients 2e-4 relative.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.paths import GOLDEN
from support.processes import run_ranks
from torch import Tensor

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.chat import load_tokenizer

LAYOUTS = {1: ["tp1"], 2: ["tp2", "tp2-sp", "pp2", "tp2-chunked"], 4: ["tp2-pp2"]}
LAYOUT_NAMES = [name for names in LAYOUTS.values() for name in names]
# Values are compared once; the layouts then differ in who holds which part.
ACTIVATIONS = ["attn_out_layer", "mlp_out_layer", "hidden_after_layer", "q_layer", "k_layer", "v_layer"]


@pytest.fixture(scope="session")
def computed(tmp_path_factory) -> Path:
    """A directory per layout with the results of every rank; one launch per number of processes."""
    directory = tmp_path_factory.mktemp("golden")
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", directory / "checkpoint")
    for processes, layouts in LAYOUTS.items():
        worker = Path(__file__).parent / "golden_worker.py"
        run_ranks(processes, worker, directory, directory / "checkpoint" / "release", *layouts)
    return directory


def ranks(computed: Path, layout: str) -> list[list[dict[str, Tensor]]]:
    """Results as ``[pipeline stage][tensor-parallel rank]``; neighbouring ranks share a pipeline stage."""
    files = sorted((computed / layout).glob("rank*.safetensors"))
    tensor = 2 if "tp2" in layout else 1
    loaded = [load_file(file) for file in files]
    return [loaded[start : start + tensor] for start in range(0, len(loaded), tensor)]


def gather(computed: Path, layout: str, key: str, dim: int | None) -> Tensor:
    """A tensor from the pipeline stage that has it, put together along `dim` (``None``: alike on every rank)."""
    (stage,) = [stage for stage in ranks(computed, layout) if key in stage[0]]
    if dim is None:
        for other in stage[1:]:
            torch.testing.assert_close(other[key], stage[0][key], atol=0, rtol=0)
        return stage[0][key]
    return torch.cat([rank[key] for rank in stage], dim=dim)


def golden_outputs(pack: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"outputs_untied_{pack}.safetensors")


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_every_activation(computed, layout, pack):
    expected = golden_outputs(pack)
    length = expected["inputs_embeds"].shape[1]
    sequence_dim = 0 if "sp" in layout else None
    compared = 0
    for name, value in expected.items():
        key = f"{pack}.{name}"
        if name in ("inputs_embeds", "final_norm") or name.startswith(("attn_out", "mlp_out", "hidden_after")):
            actual = gather(computed, layout, key, sequence_dim).transpose(0, 1)
        elif name.startswith(("q_layer", "k_layer", "v_layer")):
            actual, value = gather(computed, layout, key, 2).permute(1, 2, 0, 3), value[:, :, :length]
        else:
            continue
        torch.testing.assert_close(actual, value, atol=3e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared == 2 + 6 * 5


def test_patch_embedding(computed):
    expected = golden_outputs("pack1")
    row_major = expected["vis_patch_conv"].squeeze()
    grids = load_file(GOLDEN / "inputs_pack1.safetensors")["grid_hw"].tolist()
    cells = []
    for (height, width), image in zip(grids, row_major.split([h * w for h, w in grids]), strict=True):
        blocks = image.view(height // 2, 2, width // 2, 2, -1).transpose(1, 2)
        cells.append(blocks.reshape(-1, 4, image.shape[-1]))
    actual = gather(computed, "tp1", "pack1.vis_patch_conv", None)
    torch.testing.assert_close(actual, torch.cat(cells), atol=3e-5, rtol=0)
    for layout in LAYOUT_NAMES:
        dim = 0 if "sp" in layout else None  # under sequence parallelism each rank embeds the cells of its part
        actual = gather(computed, layout, "pack1.vit_embeds", dim)
        torch.testing.assert_close(actual, expected["vit_embeds"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_logits_and_losses(computed, layout, pack):
    logits = gather(computed, layout, f"{pack}.logits", -1).squeeze(1)
    torch.testing.assert_close(logits, golden_outputs(pack)["logits"][0], atol=1e-4, rtol=0)
    golden = json.loads((GOLDEN / "meta.json").read_text())[f"untied_{pack}"]
    for weighting, key in (("square", "loss"), ("token", "loss_token"), ("sample", "loss_sample")):
        loss = gather(computed, layout, f"{pack}.loss_{weighting}", None).item()
        assert loss == pytest.approx(golden[key], abs=1e-5), weighting


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_gradient(computed, layout):
    """Read from a distributed checkpoint and brought to published names, as an export would."""
    sizes = read_sizes(GOLDEN / "ckpt_untied")
    saved = TorchDistDirectory(computed / layout / "gradients")
    expected = load_file(GOLDEN / "grads_untied_pack1.safetensors")
    for row in tensor_table(sizes):
        for name, actual in zip(row.hf, row.split(saved.read(row.megatron)), strict=True):
            value = expected.pop(name)
            error = (actual - value).norm() / value.norm()
            assert error < 2e-4, f"{name}: relative error {error:.2e}"
    assert not expected


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_what_a_layout_saves_exports_to_the_bytes_that_came_in(computed, layout, tmp_path):
    """Hugging Face -> Megatron on any layout, saved by Megatron -> Hugging Face."""
    convert_megatron_to_hf(computed / layout / "saved", tmp_path / "hf", load_tokenizer(GOLDEN / "tokenizer"))
    expected, actual = (load_file(path / "model.safetensors") for path in (GOLDEN / "ckpt_untied", tmp_path / "hf"))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
