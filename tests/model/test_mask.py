"""The attention rule against a plain reading of its definition and the published masks, its kernels against float64."""

import math

import pytest
import torch
from safetensors.torch import load_file
from support.random_packs import random_pack, random_packs
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.model.core_attention import attend, attention_pairs, build_mask
from neo_megatron.model.cpu_kernels import tiled_attention
from neo_megatron.model.cpu_kernels.tiled_attention import TiledMask
from neo_megatron.model.mask import AttentionRule


@pytest.mark.parametrize("seed", range(5))
def test_rule_reads_like_its_definition(seed):
    document, image = random_pack(96, seed)
    allowed = AttentionRule(document[None], image[None]).dense()[0]
    for query in range(96):
        for key in range(96):
            same_document = document[query] == document[key] != -1
            same_image = image[query] == image[key] != -1
            expected = (same_document and (key <= query or same_image)) or query == key
            assert bool(allowed[query, key]) == bool(expected), (query, key)


@pytest.mark.parametrize("name", ["pack1", "textonly"])
def test_rule_is_the_published_mask(golden, name):
    inputs = load_file(golden / f"inputs_{name}.safetensors")
    tokens = inputs["input_ids"][0]
    ends = inputs["seq_boundaries"][1:].long()
    document = torch.searchsorted(ends, torch.arange(len(tokens)), right=True)
    context = tokens == 896
    image = torch.where(context, (context & ~context.roll(1)).cumsum(0) - 1, -1)
    dense = AttentionRule(document[None], image[None]).dense()[0]
    assert torch.equal(dense, inputs["attention_mask_dense"])


def test_images_look_both_ways_and_documents_stay_apart():
    document = torch.tensor([[0, 0, 0, 0, 1, 1, -1]])
    image = torch.tensor([[-1, 0, 0, -1, -1, 1, -1]])
    allowed = AttentionRule(document, image).dense()[0]
    assert allowed[1, 2] and allowed[2, 1]  # inside one image
    assert not allowed[0, 1]  # text does not see what follows it
    assert not allowed[4:6, :4].any()  # nor another document
    assert allowed[6].tolist() == [False] * 6 + [True]  # padding sees itself


def dense_attention(query, key, value, allowed, scale):
    """Softmax attention in float64, heads first; the sum written out."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeat, dim=1) for x in (key, value))
    score = (query.double() @ key.transpose(-1, -2)) * scale
    weight = score.masked_fill(~allowed[:, None], -math.inf).softmax(-1)
    return weight @ value


def random_heads(packs: int, length: int):
    """Q and K 64 wide, V 32, four query heads on two key heads, as NEO has them."""
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(packs, 4, length, 64, generator=draw)
    key, value = (torch.randn(packs, 2, length, width, generator=draw) for width in (64, 32))
    return query, key, value


# All rows; a part of them; a part that is out of order, as context parallelism may deal them out.
ROWS = [None, torch.arange(64, 128), torch.cat((torch.arange(96, 128), torch.arange(16, 48)))]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("tile_rows", [16, 128])
def test_tiles_equal_dense_float64(rows, tile_rows, monkeypatch):
    """Values and gradients, in float32 and for more than one tile to a document."""
    monkeypatch.setattr(tiled_attention, "TILE_ROWS", tile_rows)
    packs = random_packs(128, 3)
    rule = AttentionRule(packs.document_BT, packs.image_BT, rows)
    query, key, value = random_heads(3, 128)
    query = query if rows is None else query[:, :, rows]
    heads = [x.requires_grad_() for x in (query.clone(), key, value)]
    expected = dense_attention(*heads, rule.dense(), scale=32**-0.5)
    towards = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.autograd.grad(expected, heads, towards.double())
    heads_last = (x.permute(2, 0, 1, 3) for x in heads)
    actual = attend(*heads_last, build_mask(rule, torch.float32), scale=32**-0.5)
    torch.testing.assert_close(actual, expected.permute(2, 0, 1, 3).flatten(2).float(), atol=2e-6, rtol=0)
    gradients = torch.autograd.grad(actual, heads, towards.permute(2, 0, 1, 3).flatten(2))
    for actual, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)


def test_tiles_in_bfloat16_are_rounded_once():
    """Scores, weights and sums are float32 inside: the result is that of the rounded inputs, rounded."""
    rule = random_packs(64, 1)
    rounded = [x.bfloat16() for x in random_heads(1, 64)]
    expected = dense_attention(*rounded, rule.dense(), scale=32**-0.5)
    actual = attend(*(x.permute(2, 0, 1, 3) for x in rounded), build_mask(rule, torch.bfloat16), scale=32**-0.5)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected.permute(2, 0, 1, 3).flatten(2).bfloat16(), atol=1e-6, rtol=2**-7)


def test_tiles_leave_out_what_is_hidden():
    """Three documents of 100 tokens, the second with an image, and padding: the work is theirs alone."""
    document = torch.tensor([0] * 100 + [1] * 100 + [2] * 100 + [-1] * 100)[None]
    image = torch.full((1, 400), -1)
    image[0, 110:190] = 0
    tiles = TiledMask.from_rule(AttentionRule(document, image), torch.float32).tiles
    assert [(tile.rows, tile.keys) for tile in tiles] == [(slice(a, a + 100), slice(a, a + 100)) for a in (0, 100, 200)]


@pytest.mark.parametrize("rows", ROWS)
def test_pairs_of_tiles_are_counted(rows, monkeypatch):
    """Computed are those that a tile covers, and padding with itself; allowed those of the dense mask, all covered."""
    monkeypatch.setattr(tiled_attention, "TILE_ROWS", 16)
    packs = random_packs(128, 3)
    rule = AttentionRule(packs.document_BT, packs.image_BT, rows)
    mask, dense = build_mask(rule, torch.float32), rule.dense()
    covered = torch.zeros(dense.shape, dtype=torch.int)
    for tile in mask.tiles:
        covered[tile.pack, tile.rows, tile.keys] += 1
    row, pack = mask.padding_rows
    covered[pack, row, mask.padding_keys[0]] += 1
    assert covered.max() == 1 and covered[dense].min() == 1
    assert attention_pairs(mask).tolist() == [covered.sum(), dense.sum()] and covered.sum() > dense.sum()


@pytest.mark.parametrize("rows", [None, torch.arange(64, 128)])
def test_flex_mask_equals_dense_float64(rows):
    packs = random_packs(128, 2)
    rule = AttentionRule(packs.document_BT, packs.image_BT, rows)
    query, key, value = random_heads(2, 128)
    query = query if rows is None else query[:, :, rows]
    expected = dense_attention(query, key, value, rule.dense(), scale=32**-0.5)
    flex = flex_attention(query, key, value, block_mask=rule.blocks((32, 32)), scale=32**-0.5, enable_gqa=True)
    torch.testing.assert_close(flex, expected.float(), atol=2e-6, rtol=0)


def test_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match="of one shape"):
        AttentionRule(torch.zeros(1, 3), torch.zeros(1, 4))
