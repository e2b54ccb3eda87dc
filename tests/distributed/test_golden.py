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

# By processes. Tensor parallelism of a mixture of experts needs sequence parallelism; "ep2" trains one pack twice.
DENSE = {1: ["tp1"], 2: ["tp2", "tp2-sp", "pp2", "cp2", "tp2-chunked"], 4: ["tp2-pp2"]}
EXPERTS = {1: ["tp1"], 2: ["tp2-sp", "pp2", "cp2", "ep2", "tp2-sp-ep2"], 4: ["tp2-sp-pp2", "ep2-tp2-sp", "ep2-pp2"]}
LAYOUTS = {"neo": DENSE, "u1-dense": DENSE, "u1-moe": EXPERTS}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for names in layouts.values() for layout in names]
# Values are compared once; the layouts then differ in who holds which part.
ACTIVATIONS = ["attn_out_layer", "mlp_out_layer", "hidden_after_layer", "q_layer", "k_layer", "v_layer"]


class Computed:
    """Results of a layout of one model, every rank's results in a file.

    Attributes:
        sequence_dim: 0 where ranks hold parts of a sequence.
    """

    def __init__(self, directory: Path, golden: GoldenModel, layout: str) -> None:
        self.directory, self.golden, self.layout = directory / layout, golden, layout
        self.sequence_dim = 0 if "sp" in layout or "cp" in layout else None

    def ranks(self) -> list[list[dict[str, Tensor]]]:
        """Results as ``[pipeline stage][rank of the stage]``, of the first of those that have the same pack."""
        files = sorted(self.directory.glob("rank*.safetensors"))
        loaded = [load_file(file) for file in files]
        # Megatron's order: neighbours are tensor-parallel, then come context and data, then pipeline stages.
        stages = 2 if "pp2" in self.layout else 1
        holders = 2 if "tp2" in self.layout or "cp2" in self.layout else 1
        of_stage = len(loaded) // stages
        return [loaded[start : start + holders] for start in range(0, len(loaded), of_stage)]

    def gather(self, key: str, dim: int | None) -> Tensor:
        """A tensor from the pipeline stage that has it, put together along `dim` (``None``: alike on every rank)."""
        (stage,) = [stage for stage in self.ranks() if key in stage[0]]
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
    for processes in DENSE:
        cases = [f"{name}/{layout}" for name, layouts in LAYOUTS.items() for layout in layouts[processes]]
        run_ranks(processes, Path(__file__).parent / "golden_worker.py", directory, *cases)
    return directory


@pytest.fixture(params=CASES, ids="-".join)
def computed(all_computed, request) -> Computed:
    name, layout = request.param
    return Computed(all_computed / name, MODELS[name], layout)


@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_every_activation(computed, pack):
    expected = computed.golden.outputs(pack)
    length = expected["inputs_embeds"].shape[1]
    compared = 0
    for name, value in expected.items():
        key = f"{pack}.{name}"
        if name in ("inputs_embeds", "final_norm") or name.startswith(("attn_out", "mlp_out", "hidden_after")):
            actual = computed.gather(key, computed.sequence_dim).transpose(0, 1)
        elif name.startswith(("q_layer", "k_layer", "v_layer")):
            actual = computed.gather(key, 0 if "cp" in computed.layout else 2).permute(1, 2, 0, 3)
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
    # Where a sequence is split, each rank embeds the cells of its part.
    actual = computed.gather("pack1.vis_patch_conv", computed.sequence_dim)
    torch.testing.assert_close(actual, torch.cat(cells), atol=3e-5, rtol=0)
    actual = computed.gather("pack1.vit_embeds", computed.sequence_dim)
    torch.testing.assert_close(actual, expected["vit_embeds"], atol=3e-5, rtol=0)


@pytest.mark.parametrize("computed", [case for case in CASES if case[0] == "u1-moe"], ids="-".join, indirect=True)
@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_every_router(computed, pack):
    """The very same experts, and how many tokens each has."""
    expected, counts = computed.golden.outputs(pack), computed.golden.meta(pack)["expert_counts"]
    for number in range(computed.golden.sizes.num_layers):
        weight, chosen = (
            computed.gather(f"{pack}.router_{kind}_layer_{number}", computed.sequence_dim)
            for kind in ("weight", "chosen")
        )
        wanted = expected[f"router_topk_index_layer_{number}"].long()
        assert torch.equal(chosen, torch.zeros_like(chosen).scatter(1, wanted, True))
        assert chosen.sum(dim=0).tolist() == counts[number] == expected["expert_counts"][number].tolist()
        wanted_weight = expected[f"router_topk_weight_layer_{number}"]
        torch.testing.assert_close(weight.gather(1, wanted), wanted_weight, atol=3e-5, rtol=0)


@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_logits_and_losses(computed, pack):
    logits = computed.gather(f"{pack}.logits", 0 if "cp" in computed.layout else -1).squeeze(1)
    torch.testing.assert_close(logits, computed.golden.outputs(pack)["logits"][0], atol=1e-4, rtol=0)
    for weighting in computed.golden.losses:
        loss = computed.gather(f"{pack}.loss_{weighting}", None).item()
        assert loss == pytest.approx(computed.golden.loss(pack, weighting), rel=1e-5, abs=1e-5), weighting


def test_every_gradient(computed):
    """Read from a distributed checkpoint and brought to published names, as an export would."""
    saved = TorchDistDirectory(computed.directory / "gradients")
    expected = computed.golden.gradients()
    for row in tensor_table(computed.golden.sizes):
        for name, actual in zip(row.hf, row.split(saved.read(row.megatron)), strict=True):
            value = expected.pop(name)
            error = (actual - value).norm() / value.norm()
            assert error < 2e-4, f"{name}: relative error {error:.2e}"
    assert not expected


def test_what_a_layout_saves_exports_to_the_bytes_that_came_in(computed, tmp_path):
    """Hugging Face -> Megatron on any layout, saved by Megatron -> Hugging Face."""
    convert_megatron_to_hf(computed.directory / "saved", tmp_path / "hf", load_tokenizer(GOLDEN / "tokenizer"))
    files = computed.golden.checkpoint.glob("*.safetensors")
    expected = {name: tensor for file in files for name, tensor in load_file(file).items() if not of_generation(name)}
    actual = load_file(tmp_path / "hf" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
