"""Models of many sizes, Megatron's and the exported one, compute what `support/definition.py` computes in float64.

So does the published code, as its numbers for one model of each variant show.

Logits within 3e-5 of the largest one, losses within 1e-5, gradients of every tensor within 2e-4 relative.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from safetensors.torch import load_file, save_file
from support.definition import Pack, compute
from support.golden_models import MODELS
from support.golden_packs import load as golden_numbers
from torch import Tensor

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.names import hf_shapes, tensor_table
from neo_megatron.data.chat import SpecialIds
from neo_megatron.data.dataset import collate, pack_tensors
from neo_megatron.data.image import normalise
from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig

CONTEXT, END, START = 7, 8, 9
SEPARATE = NeoSizes(
    hidden_size=36,
    ffn_hidden_size=30,
    num_attention_heads=3,
    num_query_groups=3,
    head_dim=12,
    pre_buffer_layers=1,
    post_llm_layers=1,
    vocab_size=50,
    tie_word_embeddings=False,
    patch_embedding_size=12,
    rope_theta_hw=100.0,
    rope_theta_patch=50.0,
    norm_epsilon=1e-5,
    image_start_token_id=START,
    image_context_token_id=CONTEXT,
)
IN_HEAD = SEPARATE.replace(attention_form="in-head", head_dim=40, rope_theta=5e6)
EXPERTS = IN_HEAD.replace(
    num_attention_heads=6, head_dim=8, rope_theta=1e7, num_experts=5, experts_per_token=2, expert_ffn_hidden_size=17
)
ALL = dict(num_experts=3, experts_per_token=3)
# Of each document: the grids of its images, in patches.
MIXED = [[], [(4, 6)], [(2, 2), (8, 2), (2, 4)]]
TEXT, IMAGE = [[], []], [[(8, 8)]]
CASES = {
    "separate": (SEPARATE, MIXED),
    "separate-tied-no-pre-buffer": (SEPARATE.replace(pre_buffer_layers=0, tie_word_embeddings=True), MIXED),
    "in-head": (IN_HEAD, MIXED),
    "in-head-tied": (IN_HEAD.replace(num_query_groups=1, tie_word_embeddings=True, head_dim=16), MIXED),
    "in-head-text": (IN_HEAD, TEXT),
    "in-head-one-image": (IN_HEAD.replace(pre_buffer_layers=0), IMAGE),
    "experts": (EXPERTS, MIXED),
    "experts-no-pre-buffer": (EXPERTS.replace(pre_buffer_layers=0, norm_topk_prob=False), MIXED),
    "experts-text": (EXPERTS, TEXT),
    "experts-one-image": (EXPERTS.replace(tie_word_embeddings=True), IMAGE),
    "one-expert-each": (EXPERTS.replace(experts_per_token=1), MIXED),
    "one-expert-each-as-probable": (EXPERTS.replace(experts_per_token=1, norm_topk_prob=False), MIXED),
    "all-experts": (EXPERTS.replace(**ALL), MIXED),
    "all-experts-as-probable": (EXPERTS.replace(**ALL, norm_topk_prob=False), MIXED),
    "experts-separate": (SEPARATE.replace(num_experts=4, experts_per_token=2, expert_ffn_hidden_size=9), MIXED),
}
SEED = 1
BALANCE = 0.3


@dataclass(frozen=True)
class Made:
    """A random model in both forms, and a random pack in the forms of Megatron, transformers and the definition."""

    sizes: NeoSizes
    directory: Path
    weights: dict[str, Tensor]
    packed: dict[str, Tensor]
    arguments: dict[str, Tensor]
    pack: Pack


@pytest.fixture(params=CASES)
def made(request, tmp_path) -> Made:
    sizes, documents = CASES[request.param]
    draw, generator = np.random.default_rng(SEED), torch.Generator().manual_seed(SEED)

    def weight(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.rand(shape, generator=generator) + 0.5
        return torch.randn(shape, generator=generator) * (0.4 if "mlp.gate." in name else 0.15)

    weights = {name: weight(name, shape) for name, shape in hf_shapes(sizes).items()}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(sizes.to_hf()))
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    convert_hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")
    tokens: list[int] = []
    trained: list[int] = []
    lengths = []
    for images in documents:
        first = len(tokens)
        # A pack that one image fills has a single word, which is trained.
        tokens += [] if documents is IMAGE else draw.integers(10, 50, draw.integers(1, 6)).tolist()
        trained += range(first + 1, len(tokens))
        for rows, columns in images:
            tokens += [START, *[CONTEXT] * (rows * columns // 4), END]
            words = draw.integers(10, 50, 1 if documents is IMAGE else draw.integers(1, 6)).tolist()
            trained += range(len(tokens), len(tokens) + len(words))
            tokens += words
        lengths.append(len(tokens) - first)
    document = np.repeat(np.arange(len(documents), dtype=np.int32), lengths)
    grids = [grid for images in documents for grid in images]
    tokens_T, targets = np.array(tokens), np.array(trained)
    weight_M = draw.uniform(0.5, 1.5, len(targets)).astype(np.float32)
    blocks = draw.integers(0, 256, (sum(h * w for h, w in grids) // 4, 4, 768), np.uint8)
    ids = SpecialIds(CONTEXT, START, image_end=END, turn_start=-1, turn_end=-1, pad=0)
    tensors = pack_tensors(tokens_T, document, np.array(grids, np.int64).reshape(-1, 2), ids, targets, weight_M, blocks)
    return Made(
        sizes,
        tmp_path,
        weights,
        collate([{**tensors, "samples": len(documents), "broken": []}]),
        *forms(tokens_T, document, lengths, grids, targets, weight_M, row_major(blocks, grids)),
    )


def row_major(blocks: np.ndarray, grids: list[tuple[int, int]]) -> Tensor:
    """Patches in blocks of 2x2, uint8 -> normalised, row by row of each image, ``[P, 768]``."""
    images = torch.from_numpy(normalise(blocks)).split([h * w // 4 for h, w in grids]) if grids else []
    rows = [
        image.view(h // 2, w // 2, 2, 2, 768).transpose(1, 2).reshape(h * w, 768)
        for image, (h, w) in zip(images, grids, strict=True)
    ]
    return torch.cat(rows) if rows else torch.zeros(0, 768)


def forms(tokens, document, lengths, grids, targets, weight_M, pixels) -> tuple[dict[str, Tensor], Pack]:
    """The pack as arguments of the exported model, and for the definition."""
    every = torch.from_numpy(tokens)
    labels = torch.full((1, len(tokens)), -100)
    weight_T, of_next_T = torch.zeros(1, len(tokens)), torch.zeros(len(tokens))
    labels[0, targets], weight_T[0, targets] = every[targets], torch.from_numpy(weight_M)
    of_next_T[targets - 1] = torch.from_numpy(weight_M)
    arguments = {"input_ids": every[None], "labels": labels, "loss_weight": weight_T}
    arguments["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None]
    if grids:
        arguments |= {"pixel_values": pixels, "grid_hw": torch.tensor(grids)}
    return arguments, Pack(every, torch.from_numpy(document).long(), grids, pixels.double(), of_next_T.double())


def gradient(weights: dict[str, Tensor], of: Tensor) -> dict[str, Tensor]:
    values = torch.autograd.grad(of, list(weights.values()), retain_graph=True, allow_unused=True)
    zeros = (torch.zeros_like(weight) for weight in weights.values())
    return {name: zero if value is None else value for name, value, zero in zip(weights, values, zeros, strict=True)}


def close(actual: Tensor | None, expected: Tensor, name: str) -> None:
    """Differences that float32 cannot show next to gradients of the order of 0.1 do not count."""
    actual = torch.zeros_like(expected) if actual is None else actual.double()
    error = (actual - expected).norm() / expected.norm().clamp(min=0.01)
    assert error < 2e-4, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_the_published_code_computes_what_is_defined(golden, name):
    reference = MODELS[name]
    inputs, expected = golden_numbers(golden, "inputs", "pack1"), reference.outputs("pack1")
    tensors = [load_file(file) for file in sorted(reference.checkpoint.glob("*.safetensors"))]
    weights = {key: value.double() for of_file in tensors for key, value in of_file.items()}
    lengths = inputs["seq_boundaries"].diff()
    pack = Pack(
        inputs["input_ids"][0],
        torch.arange(len(lengths)).repeat_interleave(lengths),
        [tuple(grid) for grid in inputs["grid_hw"].tolist()],
        inputs["pixel_values"].double(),
        inputs[f"loss_weight_{reference.gradients_of}"].double().roll(-1),
    )
    actual = compute(reference.sizes.to_hf(), weights, pack)
    torch.testing.assert_close(actual.logits, expected["logits"][0].double(), atol=1e-4, rtol=0)
    assert actual.loss.item() == pytest.approx(reference.loss("pack1", reference.gradients_of), abs=1e-5)
    if reference.sizes.num_experts:
        assert actual.balance.item() == pytest.approx(reference.meta("pack1")["balance"]["l_aux_split"], abs=1e-4)


def test_both_models_compute_what_is_defined(megatron, made):
    weights = {name: value.double().requires_grad_() for name, value in made.weights.items()}
    expected = compute(made.sizes.to_hf(), weights, made.pack)
    assert expected.margin > 1e-4, "draw other numbers: rounding would choose other experts"
    loss = gradient(weights, expected.loss)
    balanced = loss
    if made.sizes.num_experts:
        balance = gradient(weights, expected.balance)
        balanced = {name: value + BALANCE * balance[name] for name, value in loss.items()}
    largest = expected.logits.abs().max().item()

    exported = NEOChatModel.from_pretrained(made.directory / "hf", dtype=torch.float32).eval()
    output = exported(**made.arguments, use_cache=False)
    torch.testing.assert_close(output.logits[0].double(), expected.logits, atol=3e-5 * largest, rtol=0)
    assert output.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    output.loss.backward()
    for name, parameter in exported.named_parameters():
        close(parameter.grad, loss[name], f"exported {name}")

    model = load(made)
    every = {**made.packed, "target_index": torch.arange(len(made.pack.tokens))}
    inputs = model_inputs(every, True, True, experts=bool(made.sizes.num_experts))
    del inputs["targets"]
    with torch.no_grad():
        logits = model(**inputs)
    torch.testing.assert_close(logits.double(), expected.logits, atol=3e-5 * largest, rtol=0)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    inputs = model_inputs(made.packed, True, True, experts=bool(made.sizes.num_experts))
    nll = model(**inputs, loss_weights=torch.ones(2))
    weight = made.packed["target_weight"]
    actual = (nll * weight).sum() / weight.sum()
    assert actual.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    actual.backward()
    for name, value in gradients(model, made.sizes).items():
        close(value, balanced[name], name)


def load(made: Made) -> NeoModel:
    settings = {"transformer_impl": "local", "gradient_accumulation_fusion": False}
    coefficient = BALANCE if made.sizes.num_experts else 0.0
    model = NeoModel(NeoConfig.from_sizes(made.sizes, balance_loss_coeff=coefficient, **settings))
    wanted = model.sharded_state_dict()
    read = dist_checkpointing.load(dict(wanted), str(made.directory / "megatron" / "release"))
    model.load_state_dict({name: read[name] for name in wanted}, strict=True)
    return model


def gradients(model: NeoModel, sizes: NeoSizes) -> dict[str, Tensor]:
    """By published names."""
    of = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    stored = {value.key: name for name, value in model.sharded_state_dict().items()}
    found: dict[str, Tensor] = {}
    for row in tensor_table(sizes):
        if row.expert:  # a module for each expert
            before, _, after = row.megatron.partition("experts.experts.")
            experts = [of[f"{before}experts.local_experts.{e}.{after}"] for e in range(sizes.num_experts)]
            value = torch.stack(experts)
        else:
            value = of[stored[row.megatron]]
        found |= zip(row.hf, row.split(value), strict=True)
    return found
