"""The attention rule against a plain reading of its definition and the published masks, its kernels against float64."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.model.core_attention import attend, build_mask
from neo_megatron.model.mask import AttentionRule


def random_pack(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A pack of documents of 1-40 tokens with images of 1-9 patches at random places, padded at the end."""
    draw = torch.Generator().manual_seed(seed)
    document, image, documents, images = [], [], 0, 0
    while len(document) < length - 16:
        size = int(torch.randint(1, 41, (), generator=draw))
        document += [documents] * size
        patches = min(size, int(torch.randint(0, 10, (), generator=draw)))
        before = int(torch.randint(0, size - patches + 1, (), generator=draw))
        image += [-1] * before + [images] * patches + [-1] * (size - patches - before)
        documents, images = documents + 1, images + 1
    document, image = document[:length], image[:length]
    pad = [-1] * (length - len(document))
    return torch.tensor(document + pad, dtype=torch.int32), torch.tensor(image + pad, dtype=torch.int32)


def random_packs(length: int, count: int) -> AttentionRule:
    documents, images = zip(*(random_pack(length, seed) for seed in range(count)), strict=True)
    return AttentionRule(torch.stack(documents), torch.stack(images))


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


def test_sdpa_path_equals_dense_float64():
    rule = random_packs(128, 3)
    query, key, value = random_heads(3, 128)
    expected = dense_attention(query, key, value, rule.dense(), scale=32**-0.5)
    heads_last = (x.permute(2, 0, 1, 3) for x in (query, key, value))
    actual = attend(*heads_last, build_mask(rule, torch.float32), scale=32**-0.5)
    torch.testing.assert_close(actual, expected.permute(2, 0, 1, 3).flatten(2).float(), atol=2e-6, rtol=0)


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
