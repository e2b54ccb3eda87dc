"""Context parallelism equals attention on one rank, in both ways; what it sends, holds, and how even its work is."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.processes import run_ranks
from support.random_packs import random_packs
from torch import Tensor

from neo_megatron.model.context_parallel_cost import WAYS, default_way, saved_bytes, sent_bytes
from neo_megatron.model.cp_token_split import allowed_keys, contiguous_rows, even_rows
from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.micro_batch import context_share

WORKER = Path(__file__).parents[1] / "distributed" / "context_parallel_worker.py"
CASES = [(way, ranks) for way in ("a2a", "allgather") for ranks in (2, 4)]


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Two packs of 96 tokens, 8 query heads on 4 key-value heads, float64; and what 4 ranks made of them."""
    directory = tmp_path_factory.mktemp("context-parallel")
    draw = torch.Generator().manual_seed(0)
    packs = random_packs(96, 2)
    widths = {"query": (8, 16), "key": (4, 16), "value": (4, 8), "gradient": (64,)}
    inputs = {name: torch.randn(96, 2, *width, generator=draw).double() for name, width in widths.items()}
    inputs |= {"document": packs.document_BT, "image": packs.image_BT}
    save_file(inputs, directory / "inputs.safetensors")
    run_ranks(4, WORKER, directory)
    return inputs, [load_file(directory / f"rank{rank}.safetensors") for rank in range(4)]


def dense_attention(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients of the complete packs, every sum written out."""
    query, key, value = (inputs[name].clone().requires_grad_() for name in ("query", "key", "value"))
    allowed = AttentionRule(inputs["document"], inputs["image"]).dense()
    score = torch.einsum("sbgrd,tbgd->bgrst", query.unflatten(2, (4, 2)), key) * 0.25
    weight = score.masked_fill(~allowed[:, None, None], -math.inf).softmax(-1)
    output = torch.einsum("bgrst,tbgd->sbgrd", weight, value).flatten(2)
    output.backward(inputs["gradient"])
    return {"output": output.detach(), "query": query.grad, "key": key.grad, "value": value.grad}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("way, ranks", CASES)
def test_outputs_and_gradients_equal_dense_float64(computed, way, ranks, recompute):
    inputs, results = computed
    case = f"{way}-{ranks}-{recompute}"
    rows = torch.cat([results[rank][f"{case}.rows"] for rank in range(ranks)])
    assert rows.sort().values.tolist() == list(range(96))
    for name, expected in dense_attention(inputs).items():
        parts = torch.cat([results[rank][f"{case}.{name}"] for rank in range(ranks)])
        torch.testing.assert_close(parts, expected[rows], atol=1e-12, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("way, ranks", CASES)
def test_what_is_kept_and_sent_is_what_the_planner_counts(computed, way, ranks):
    """Above all, keys and values of complete packs do not stay until the backward; more ranks keep less each."""
    shape = (256 // ranks, 8, 4, (32, 16))
    for result in computed[1]:
        kept, *sent = result[f"{way}-{ranks}.traffic"].tolist()
        assert kept == pytest.approx(saved_bytes(*shape, element_size=4), rel=1e-4)
        assert tuple(sent) == sent_bytes(way, *shape, ranks, element_size=4)


@pytest.mark.parametrize(
    "query_heads, key_value_heads, ranks, way",
    [
        (16, 8, 2, "a2a"),  # NEO-2B, a draw
        (16, 8, 8, "a2a"),
        (32, 8, 2, "allgather"),  # NEO-9B
        (32, 8, 4, "a2a"),
        (4, 1, 8, "allgather"),  # NEO-9B at TP8: one key-value head cannot be shared out
    ],
)
def test_the_default_way_sends_less(query_heads, key_value_heads, ranks, way):
    assert default_way(query_heads, key_value_heads, ranks) == way
    total = {name: sum(sent_bytes(name, 1024, query_heads, key_value_heads, (256, 128), ranks)) for name in WAYS}
    assert total[way] == min(total.values()) or key_value_heads % ranks


def test_allowed_keys_counts_what_the_mask_allows():
    rule = random_packs(200, 4)
    assert torch.equal(allowed_keys(rule.document_BT, rule.image_BT), rule.dense().sum(-1))


def packs_of(length: int, documents: int, images: int, image_tokens: int) -> tuple[Tensor, Tensor]:
    """One pack of equal documents, each with consecutive images of equal size from its first quarter on."""
    place = torch.arange(length)
    size = length // documents
    within = place % size - size // 4
    number = torch.where((within >= 0) & (within < images * image_tokens), within // max(image_tokens, 1), -1)
    image = torch.where(number >= 0, number + place // size * images, -1)
    return (place // size)[None].int(), image[None].int()


@pytest.mark.parametrize(
    "name, pack, naive",
    [
        ("one document", (131072, 1, 0, 0), 1.875),
        ("64 documents", (131072, 64, 0, 0), 1.0),
        ("big images", (131072, 2, 3, 16384), 1.684),
    ],
)
def test_every_rank_has_the_same_work(name, pack, naive):
    """Most work of a rank over the mean, at CP8; cut into contiguous parts it is `naive`."""
    document, image = packs_of(*pack)
    work = allowed_keys(document, image)[0].double()
    contiguous, even = (work[rows].sum(dim=1) for rows in (contiguous_rows(131072, 8), even_rows(document, image, 8)))
    assert float(contiguous.max() / contiguous.mean()) == pytest.approx(naive, abs=0.001)
    assert even.max() / even.mean() < 1.005
    assert even_rows(document, image, 8).flatten().sort().values.equal(torch.arange(131072))


def test_a_share_keeps_every_token_target_and_image_once():
    draw = torch.Generator().manual_seed(0)
    rule = random_packs(96, 2)
    packs = {
        "tokens": torch.randint(0, 1000, (2, 96), generator=draw),
        "positions_thw": torch.randint(0, 9, (2, 96, 3), generator=draw),
        "document": rule.document_BT,
        "image": rule.image_BT,
        "image_token_index": torch.nonzero(rule.image_BT.flatten() >= 0).squeeze(1),
        "target_index": torch.randint(0, 192, (40,), generator=draw).unique(),
    }
    packs["patches"] = packs["image_token_index"] * 3
    packs["targets"] = packs["target_index"] * 5
    packs["target_weight"] = packs["target_index"] * 7.0
    for gather_keys in (False, True):
        shares = [context_share(packs, rank, 4, gather_keys) for rank in range(4)]
        rows = torch.cat([share["query_rows"] for share in shares]) if gather_keys else torch.arange(96)
        for name in ("tokens", "positions_thw"):
            assert torch.equal(torch.cat([share[name] for share in shares], dim=1), packs[name][:, rows])
        # The token that an index points at, wherever it is held.
        for index, belonging, factor in (("image_token_index", "patches", 3), ("target_index", "targets", 5)):
            found = []
            for rank, share in enumerate(shares):
                pack, local = share[index] // 24, share[index] % 24
                found.append(pack * 96 + rows[rank * 24 + local])
                assert torch.equal(share[belonging], found[-1] * factor)
            assert torch.equal(torch.cat(found).sort().values, packs[index])
        if gather_keys:
            assert torch.equal(rows[shares[0]["key_order"]], torch.arange(96))
