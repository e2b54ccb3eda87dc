"""Attention compiled on a GPU is one graph, whatever the packs hold: traced here, run uncompiled.

Started by `test_compiled.py` in a process of its own: the platform for machines without a GPU turns compiling off.
"""

import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.compiled import GRAPHS, compiled
from neo_megatron.model.mask import AttentionRule

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
print("one graph")

torch._dynamo.reset()
double = compiled(lambda x: 2 * x, backend="eager")
for length in range(2, 2 + GRAPHS):
    assert double(torch.ones(length)).sum() == 2 * length
try:
    double(torch.ones(2 + GRAPHS))
except torch._dynamo.exc.FailOnRecompileLimitHit:
    print("never uncompiled")
