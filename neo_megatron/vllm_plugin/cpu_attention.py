"""vLLM's attention on a CPU with images whose tokens see each other.

The kernel knows sequences that are causal and sequences that are not. The queries of a request are handed to it as
several sequences over the same cache: text is causal, and the tokens of an image see all keys up to its end.
"""

from dataclasses import replace
from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionMetadata, CPUAttentionMetadataBuilder

from neo_megatron.vllm_plugin.spans import spans_of


class NEOCPUAttentionBackend(CPUAttentionBackend):
    """`CPU_ATTN` for models with images that are seen in both directions."""

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return NEOCPUAttentionMetadataBuilder


class NEOCPUAttentionMetadataBuilder(CPUAttentionMetadataBuilder):
    """Cuts requests at their images before vLLM's builder plans the kernel's work."""

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> CPUAttentionMetadata:
        given = common_attn_metadata
        images = {request: spans for request, spans in (given.mm_req_doc_ranges or {}).items() if spans}
        if not images:
            return super().build(common_prefix_len, given, fast_build)
        starts, totals = given.query_start_loc.tolist(), given.seq_lens.tolist()
        rows, lengths, ends, causal = [], [], [], []
        for request in range(given.num_reqs):
            queries = starts[request + 1] - starts[request]
            for first, end, is_causal in spans_of(totals[request] - queries, totals[request], images.get(request, ())):
                rows.append(request)
                lengths.append(end - first)
                ends.append(end)
                causal.append(int(is_causal))
        if all(causal):
            return super().build(common_prefix_len, given, fast_build)
        loc = torch.tensor([0, *lengths]).cumsum(0).to(given.query_start_loc.dtype)
        cut = replace(
            given,
            num_reqs=len(rows),
            query_start_loc=loc,
            query_start_loc_cpu=loc,
            seq_lens=torch.tensor(ends, dtype=given.seq_lens.dtype),
            max_query_len=max(lengths),
            block_table_tensor=given.block_table_tensor[rows].contiguous(),
            causal=torch.tensor(causal, dtype=torch.int32),
        )
        return super().build(common_prefix_len, cut, fast_build)
