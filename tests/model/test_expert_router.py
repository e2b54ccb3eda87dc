"""The balance loss equals the published one, and the figures of the log are those of its numbers."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support.golden_models import MODELS

REFERENCE = MODELS["u1-moe"]
E = 8


@pytest.fixture
def model(megatron, tmp_path):
    """The published model, with a balance loss."""
    from megatron.core import dist_checkpointing

    from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
    from neo_megatron.model.neo_model import NeoModel
    from neo_megatron.model.transformer_config import NeoConfig

    settings = {"transformer_impl": "local", "gradient_accumulation_fusion": False, "balance_loss_coeff": 1.0}
    model = NeoModel(NeoConfig.from_sizes(REFERENCE.sizes, **settings))
    convert_hf_to_megatron(REFERENCE.checkpoint, tmp_path / "megatron")
    wanted = model.sharded_state_dict()
    read = dist_checkpointing.load(dict(wanted), str(tmp_path / "megatron" / "release"))
    model.load_state_dict({name: read[name] for name in wanted}, strict=True)
    return model


def backward(model, pack: str) -> None:
    """The gradient of the balance loss alone."""
    from distributed.golden_worker import golden_packs
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from neo_megatron.model.micro_batch import model_inputs

    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    inputs = model_inputs(golden_packs(pack, "token"), first_stage=True, last_stage=True, experts=True)
    nll = model(**inputs, loss_weights=torch.ones(2))
    (0 * nll.sum()).backward()


def counted(model) -> torch.Tensor:
    """``[layers, 2, 2E + 2]``, since the last call."""
    routers = [layer.mlp.router for layer in model.decoder.layers]
    result = torch.stack([router.counted for router in routers])
    for router in routers:
        router.counted = None
    return result


@pytest.mark.parametrize("pack", ["pack1", "textonly"])
def test_frequencies_and_probabilities_are_the_published_ones(model, pack):
    backward(model, pack)
    counts, sums, tokens, _ = counted(model).split((E, E, 1, 1), dim=-1)
    expected = load_file(REFERENCE.directory / f"balance_moe_{pack}.safetensors")
    for number, modality in enumerate(("text", "image")):
        n = tokens[:, number].clamp(min=1)
        torch.testing.assert_close((counts[:, number] / n / 2).float(), expected[f"f_{modality}"], atol=1e-6, rtol=0)
        torch.testing.assert_close((sums[:, number] / n).float(), expected[f"p_{modality}"], atol=1e-5, rtol=0)
    split = E * ((counts / 2) * sums / tokens.square().clamp(min=1)).sum()
    assert split.item() == pytest.approx(REFERENCE.meta(pack)["balance"]["l_aux_split"], rel=1e-5)


def test_the_gradient_is_the_published_one(model):
    from neo_megatron.checkpoint.names import tensor_table

    backward(model, "pack1")
    stored = {value.key: name for name, value in model.sharded_state_dict().items()}
    expected = load_file(REFERENCE.directory / "balance_moe_pack1.safetensors")
    norms = REFERENCE.meta("pack1")["balance"]["grad_norms"]
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared = 0
    for row in tensor_table(REFERENCE.sizes):
        if row.expert:  # one module for each expert here; their inputs' gradients are in all that comes before
            continue
        for name, actual in zip(row.hf, row.split(gradients[stored[row.megatron]]), strict=True):
            assert actual.norm().item() == pytest.approx(norms[name], rel=2e-4, abs=1e-6), name
            if (wanted := expected.pop(f"grad.{name}", None)) is not None:
                assert (actual - wanted).norm() < 2e-4 * wanted.norm(), name
            compared += 1
    assert compared > 60 and not any(name.startswith("grad.") for name in expected)


def test_padding_has_no_part_in_it(model):
    from distributed.golden_worker import golden_packs

    from neo_megatron.model.micro_batch import model_inputs

    packs = golden_packs("pack1", "token")
    length = packs["tokens"].shape[1]
    model(**model_inputs(packs, True, True, experts=True), loss_weights=torch.ones(2))
    alone = counted(model)
    more = {**packs, "tokens": torch.cat((packs["tokens"], packs["tokens"][:, :30]), dim=1)}
    more["positions_thw"] = torch.cat((packs["positions_thw"], packs["positions_thw"][:, :30]), dim=1)
    for name in ("document", "image"):
        more[name] = torch.cat((packs[name], torch.full((1, 30), -1, dtype=torch.int32)), dim=1)
    assert more["tokens"].shape[1] == length + 30
    model(**model_inputs(more, True, True, experts=True), loss_weights=torch.ones(2))
    torch.testing.assert_close(counted(model), alone, atol=1e-4, rtol=0)


def test_nothing_is_counted_without_training(model):
    from distributed.golden_worker import golden_packs

    from neo_megatron.model.micro_batch import model_inputs

    inputs = model_inputs(golden_packs("pack1", "token"), True, True, experts=True)
    with torch.no_grad():
        model(**inputs)
    model.eval()
    model(**inputs)
    assert all(layer.mlp.router.counted is None for layer in model.decoder.layers)


def test_figures_of_the_log():
    from neo_megatron.model.expert_router import balance_of

    # Four experts: 6 tokens of text to the first two, none of an image.
    sums = torch.tensor([[6.0, 6, 0, 0, 0, 0, 0, 0, 6, 6 * math.log(2)], [0.0] * 10]).double()
    figures = balance_of(sums, 4)
    assert figures["load imbalance"][0] == 2 and figures["dead experts"][0] == 0.5
    assert figures["router entropy"][0].item() == pytest.approx(0.5)
    assert all(values[1].isnan() for values in figures.values())
