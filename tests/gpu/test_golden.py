"""The numbers of the published code, computed on the GPU in float32, with the tolerances of the CPU."""

import json

import pytest
import torch
from gpu.conftest import to_gpu
from safetensors.torch import load_file
from support.paths import GOLDEN

from neo_megatron.checkpoint.names import tensor_table
from neo_megatron.checkpoint.neo_directory import read_sizes


@pytest.fixture(scope="module")
def model(one_gpu, tmp_path_factory):
    from megatron.core import dist_checkpointing

    from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
    from neo_megatron.model.neo_model import NeoModel
    from neo_megatron.model.transformer_config import NeoConfig

    directory = tmp_path_factory.mktemp("golden") / "megatron"
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", directory)
    sizes = read_sizes(GOLDEN / "ckpt_untied")
    config = NeoConfig.from_sizes(sizes, transformer_impl="local", gradient_accumulation_fusion=False)
    model = NeoModel(config).cuda()
    wanted = model.sharded_state_dict()
    read = dist_checkpointing.load(dict(wanted), str(directory / "release"))
    model.load_state_dict({name: read[name] for name in wanted}, strict=True)
    return model


def inputs_of(name: str, weighting: str = "square"):
    from distributed.golden_worker import golden_packs

    from neo_megatron.model.micro_batch import model_inputs

    packs = golden_packs(name, weighting)
    return to_gpu(model_inputs(packs, first_stage=True, last_stage=True)), packs["target_weight"].cuda()


@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_logits_and_losses(model, pack):
    inputs, _ = inputs_of(pack)
    complete = {name: value for name, value in inputs.items() if name not in ("target_index", "targets")}
    with torch.no_grad():
        logits = model(**complete).cpu()
    torch.testing.assert_close(
        logits, load_file(GOLDEN / f"outputs_untied_{pack}.safetensors")["logits"][0], atol=1e-4, rtol=0
    )
    golden = json.loads((GOLDEN / "meta.json").read_text())[f"untied_{pack}"]
    for weighting, key in (("square", "loss"), ("token", "loss_token"), ("sample", "loss_sample")):
        inputs, weight = inputs_of(pack, weighting)
        with torch.no_grad():
            loss = (model(**inputs) * weight).sum() / weight.sum()
        assert loss.item() == pytest.approx(golden[key], abs=1e-5), weighting


def test_every_gradient(model, tmp_path):
    """Saved as a checkpoint and brought to published names."""
    from megatron.core import dist_checkpointing

    from neo_megatron.checkpoint.torch_dist import TorchDistDirectory

    inputs, weight = inputs_of("pack1")
    model.zero_grad()
    ((model(**inputs) * weight).sum() / weight.sum()).backward()
    weights = {parameter: parameter.data for parameter in model.parameters()}
    for parameter in weights:
        parameter.data = parameter.grad
    state = model.sharded_state_dict()
    dist_checkpointing.save(state, str(tmp_path))
    for parameter, value in weights.items():
        parameter.data = value
    saved, expected = TorchDistDirectory(tmp_path), load_file(GOLDEN / "grads_untied_pack1.safetensors")
    for row in tensor_table(model.config.sizes):
        for name, actual in zip(row.hf, row.split(saved.read(row.megatron)), strict=True):
            value = expected.pop(name)
            error = ((actual - value).norm() / value.norm()).item()
            assert error < 2e-4, f"{name}: relative error {error:.2e}"
    assert not expected
