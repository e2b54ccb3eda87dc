"""Each function compiled on a GPU is one graph, whatever the packs hold: traced here, run uncompiled.

Started by `test_qkv_prepare.py` in a process of its own: the platform for machines without a GPU turns compiling off.
"""

import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.native_rope import NativeRotary
from neo_megatron.model.qkv_prepare import at_once

attention = torch.compile(flex_attention, dynamic=False, backend="eager", fullgraph=True)
x = torch.randn(1, 2, 128, 16)
for document_length, image_tokens in ((128, 0), (30, 7), (1, 0), (64, 64)):
    document = (torch.arange(128) // document_length).int()[None]
    image = torch.where(torch.arange(128) % document_length < image_tokens, document, -1)
    rule = AttentionRule(document, image)
    got = attention(x, x, x, block_mask=SeenKeys.of(rule).blocks(128, (32, 32)), kernel_options={"fwd_BLOCK_M": 32})
    wanted = torch.nn.functional.scaled_dot_product_attention(x, x, x, rule.dense()[:, None])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
assert counters["stats"]["unique_graphs"] == 1, counters

heads = torch.compile(at_once, dynamic=False, backend="aot_eager", fullgraph=True)
for form, (counts, norm_widths, axes) in enumerate((((5, 4), (16, 8, 8), (16, 8, 8)), ((5,), (8, 8), (8, 4, 4)))):
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        projections = tuple(torch.randn(6, 2, 2, count, 16, generator=draw) for count in counts)
        norms = tuple(torch.rand(width, generator=draw) for width in norm_widths)
        rotary = NativeRotary.from_positions(torch.randint(0, 50, (2, 6, 3), generator=draw), axes, 1e6, 1e4)
        tables = tuple((table.cos, table.sin) for table in rotary.tables)
        given = [tensor.requires_grad_() for tensor in (*projections, *norms)]
        results = []
        for function in (at_once, heads):
            out = function(projections, norms, norms, tables, 1e-6)
            results.append([*out, *torch.autograd.grad(sum((part**2).sum() for part in out), given)])
        torch.testing.assert_close(*results, atol=1e-4, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 2 + form, counters
print("one graph each")
