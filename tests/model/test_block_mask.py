"""Blocks made from intervals against those that PyTorch makes from every pair."""

import pytest
import torch
from support.random_packs import random_packs
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.model.block_mask import SeenKeys, computed_pairs
from neo_megatron.model.mask import AttentionRule

# All rows; a part of them, ending within a block; a part that is out of order.
ROWS = [None, torch.arange(64, 160), torch.cat((torch.arange(200, 240), torch.arange(16, 40)))]


def lists(mask):
    """For each block of rows the numbers of its partial and of its full blocks of keys."""
    pairs = ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices))
    pairs += ((mask.q_num_blocks, mask.q_indices), (mask.full_q_num_blocks, mask.full_q_indices))
    return [
        [line[:count].tolist() for count, line in zip(counts.flatten(), indices.flatten(0, 2), strict=True)]
        for counts, indices in pairs
    ]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("block_size", [(8, 8), (32, 16), (16, 32)])
@pytest.mark.parametrize("length", [256, 250])
def test_blocks_are_those_of_every_pair(rows, block_size, length):
    """Documents of 1-40 tokens: blocks with several documents, inside one, of padding alone, and ragged last ones."""
    packs = random_packs(length, 4)
    document = packs.document_BT.clone()
    document[3, 100:] = 7  # a long document, and an image that fills blocks
    image = packs.image_BT.clone()
    image[3, 100:200] = 999
    image[3, 200:] = -1
    rule = AttentionRule(document, image, rows)
    seen = SeenKeys.of(rule)
    mask, expected = seen.blocks(length, block_size), rule.blocks(block_size)
    assert lists(mask) == lists(expected)
    assert mask.seq_lengths == expected.seq_lengths
    assert any(map(len, lists(mask)[1])), "no full block: nothing tested"
    dense = rule.dense()
    assert seen.pairs == dense.sum()
    assert computed_pairs(mask) == sum(len(line) for one in lists(expected)[:2] for line in one) * (
        block_size[0] * block_size[1]
    )
    pack, query, key = (x.flatten() for x in torch.meshgrid(*map(torch.arange, dense.shape), indexing="ij"))
    assert torch.equal(mask.mask_mod(pack, 0, query, key).view(dense.shape), dense)


def test_attention_over_these_blocks_is_that_of_the_dense_mask():
    packs = random_packs(128, 2)
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, 128, width, generator=draw) for width in (64, 64, 32))
    mask = SeenKeys.of(packs).blocks(128, (32, 32))
    flex = flex_attention(query, key, value, block_mask=mask)
    score = (query.double() @ key.double().mT * 64**-0.5).masked_fill(~packs.dense()[:, None], -torch.inf)
    torch.testing.assert_close(flex, (score.softmax(-1) @ value.double()).float(), atol=2e-6, rtol=0)
