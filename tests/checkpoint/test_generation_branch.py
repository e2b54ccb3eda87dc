"""A NEO-unify that was converted comes back complete: every tensor of both branches, bit for bit."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.paths import GOLDEN

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.errors import CheckpointError

UNIFY = GOLDEN / "u1"


def tensors_of(directory) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def export(source, room, **more):
    convert_hf_to_megatron(source, room / "megatron")
    convert_megatron_to_hf(room / "megatron", room / "hf", load_tokenizer(GOLDEN / "tokenizer"), **more)
    return room / "hf"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_an_untrained_conversion_equals_the_input(tmp_path, kind):
    """In several files, and with types of their own: published ones have the understanding branch in bfloat16."""
    source = shutil.copytree(UNIFY / kind, tmp_path / "source", copy_function=shutil.copyfile)
    for file in source.glob("*.safetensors"):
        mixed = {
            name: tensor if "mot_gen" in name or "fm_modules" in name else tensor.bfloat16()
            for name, tensor in load_file(file).items()
        }
        save_file(mixed, file, metadata={"format": "pt"})
    hf = export(source, tmp_path, generation_branch=source, shard_bytes=1 << 20)
    expected, actual = tensors_of(source), tensors_of(hf)
    assert len(list(hf.glob("*.safetensors"))) > 1 and actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert json.loads((hf / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (hf / "added_tokens.json").read_bytes() == (source / "added_tokens.json").read_bytes()
    assert not list(hf.glob("*.py")), "the code is that which was published with it"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_a_branch_of_another_model_is_refused(tmp_path, golden):
    convert_hf_to_megatron(UNIFY / "dense", tmp_path / "megatron")
    tokenizer = load_tokenizer(GOLDEN / "tokenizer")
    with pytest.raises(CheckpointError, match=r"moe has rope_theta 10000000.0 \(here 5000000.0\), num_experts 8"):
        convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "hf", tokenizer, generation_branch=UNIFY / "moe")
    with pytest.raises(CheckpointError, match="ckpt_untied has no generation branch: give the NEO-unify"):
        convert_megatron_to_hf(
            tmp_path / "megatron", tmp_path / "hf", tokenizer, generation_branch=golden / "ckpt_untied"
        )
    assert not (tmp_path / "hf").exists()
