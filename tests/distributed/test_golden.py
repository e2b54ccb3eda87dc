"""The models equal the published ones: activations, logits, losses and gradients, and the same numbers on every layout.

Tolerances are those of the reference numbers: activations 3e-5, logits 1e-4, losses 1e-5, gradients 2e-4 relative.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.golden_models import MODELS, GoldenModel
from support.paths import GOLDEN
from support.processes import run_ranks
from torch import Tensor

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.published_config import of_generation
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.chat import load_tokenizer

LAYOUTS = {1: ["tp1"], 2: ["tp2", "tp2-sp", "pp2", "cp2", "tp2-chunked"], 4: ["tp2-pp2"]}
LAYOUT_NAMES = [name for names in LAYOUTS.values() for name in names]
# Values are compared once; the layouts then differ in who holds which part.
ACTIVATIONS = ["attn_out_layer", "mlp_out_layer", "hidden_after_layer", "q_layer", "k_layer", "v_layer"]


class Computed:
    """What the layouts of one model computed: a directory for each, with the results of every rank."""

    def __init__(self, directory: Path, golden: GoldenModel) -> None:
        self.directory, self.golden = directory, golden

    def ranks(self, layout: str) -> list[list[dict[str, Tensor]]]:
        """Results as ``[pipeline stage][rank of the stage]``; neighbouring ranks share a pipeline stage."""
        files = sorted((self.directory / layout).glob("rank*.safetensors"))
        of_stage = 2 if "tp2" in layout or "cp2" in layout else 1
        loaded = [load_file(file) for file in files]
        return [loaded[start : start + of_stage] for start in range(0, len(loaded), of_stage)]

    def gather(self, layout: str, key: str, dim: int | None) -> Tensor:
        """A tensor from the pipeline stage that has it, put together along `dim` (``None``: alike on every rank)."""
        (stage,) = [stage for stage in self.ranks(layout) if key in stage[0]]
        if dim is None:
            for other in stage[1:]:
                torch.testing.assert_close(other[key], stage[0][key], atol=0, rtol=0)
            return stage[0][key]
        return torch.cat([rank[key] for rank in stage], dim=dim)


@pytest.fixture(scope="session")
def all_computed(tmp_path_factory) -> Path:
    """One launch per number of processes."""
    directory = tmp_path_factory.mktemp("golden")
    for name, golden in MODELS.items():
        (directory / name).mkdir()
        convert_hf_to_megatron(golden.checkpoint, directory / name / "checkpoint")
    for processes, layouts in LAYOUTS.items():
        cases = [f"{name}/{layout}" for name in MODELS for layout in layouts]
        run_ranks(processes, Path(__file__).parent / "golden_worker.py", directory, *cases)
    return directory


@pytest.fixture(params=MODELS)
def computed(all_computed, request) -> Computed:
    return Computed(all_computed / request.param, MODELS[request.param])


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_every_activation(computed, layout, pack):
    expected = computed.golden.outputs(pack)
    length = expected["inputs_embeds"].shape[1]
    sequence_dim = 0 if "sp" in layout or "cp" in layout else None
    compared = 0
    for name, value in expected.items():
        key = f"{pack}.{name}"
        if name in ("inputs_embeds", "final_norm") or name.startswith(("attn_out", "mlp_out", "hidden_after")):
            actual = computed.gather(layout, key, sequence_dim).transpose(0, 1)
        elif name.startswith(("q_layer", "k_layer", "v_layer")):
            actual = computed.gather(layout, key, 0 if "cp" in layout else 2).permute(1, 2, 0, 3)
            value = value[:, :, :length]
        else:
            continue
        torch.testing.assert_close(actual, value, atol=3e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        compared += 1
    assert compared == 2 + 6 * 5


def test_patch_embedding(computed):
    expected = computed.golden.outputs("pack1")
    row_major = expected["vis_patch_conv"].squeeze()
    grids = load_file(GOLDEN / "inputs_pack1.safetensors")["grid_hw"].tolist()
    cells = []
    for (height, width), image in zip(grids, row_major.split([h * w for h, w in grids]), strict=True):
        blocks = image.view(height // 2, 2, width // 2, 2, -1).transpose(1, 2)
        cells.append(blocks.reshape(-1, 4, image.shape[-1]))
    actual = computed.gather("tp1", "pack1.vis_patch_conv", None)
    torch.testing.assert_close(actual, torch.cat(cells), atol=3e-5, rtol=0)
    for layout in LAYOUT_NAMES:
        dim = 0 if "sp" in layout or "cp" in layout else None  # each rank embeds the cells of its part
        actual = computed.gather(layout, "pack1.vit_embeds", dim)
        torch.testing.assert_close(actual, expected["vit_embeds"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_logits_and_losses(computed, layout, pack):
    logits = computed.gather(layout, f"{pack}.logits", 0 if "cp" in layout else -1).squeeze(1)
    torch.testing.assert_close(logits, computed.golden.outputs(pack)["logits"][0], atol=1e-4, rtol=0)
    for weighting in computed.golden.losses:
        loss = computed.gather(layout, f"{pack}.loss_{weighting}", None).item()
        assert loss == pytest.approx(computed.golden.loss(pack, weighting), rel=1e-5, abs=1e-5), weighting


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_every_gradient(computed, layout):
    """Read from a distributed checkpoint and brought to published names, as an export would."""
    saved = TorchDistDirectory(computed.directory / layout / "gradients")
    expected = computed.golden.gradients()
    for row in tensor_table(computed.golden.sizes):
        for name, actual in zip(row.hf, row.split(saved.read(row.megatron)), strict=True):
            value = expected.pop(name)
            error = (actual - value).norm() / value.norm()
            assert error < 2e-4, f"{name}: relative error {error:.2e}"
    assert not expected


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_what_a_layout_saves_exports_to_the_bytes_that_came_in(computed, layout, tmp_path):
    """Hugging Face -> Megatron on any layout, saved by Megatron -> Hugging Face."""
    convert_megatron_to_hf(computed.directory / layout / "saved", tmp_path / "hf", load_tokenizer(GOLDEN / "tokenizer"))
    files = computed.golden.checkpoint.glob("*.safetensors")
    expected = {name: tensor for file in files for name, tensor in load_file(file).items() if not of_generation(name)}
    actual = load_file(tmp_path / "hf" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
