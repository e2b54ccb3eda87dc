"""Counts bytes that a real model keeps for its backward pass and sends, on a CPU under a fake process group.

Arguments: a JSON list of {"sizes", "stage", "tensor", "context", "experts", "expert_tensor", "settings" of NeoConfig,
"batch" as in `packs`}. The last line printed is the JSON list of [bytes kept between forward and backward, bytes sent
in both]. All experts get as many tokens.
"""

import gc
import json
import math
import sys

import torch

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings, model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neo_megatron.model.config import NeoSizes
from neo_megatron.model.expert_router import ExpertRouter
from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.micro_batch import context_share, model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig


def packs(length: int, image_tokens: int, trained: int) -> dict[str, torch.Tensor]:
    """One pack of two documents alike: each begins with an image, and its last tokens are trained."""
    half, place = length // 2, torch.arange(length)
    document, within = place // half, place % half
    image = torch.where(within < image_tokens // 2, document, -1).to(torch.int32)
    targets = torch.nonzero(within >= half - trained // 2).flatten()
    return {
        "tokens": torch.zeros(1, length, dtype=torch.int64),
        "positions_thw": torch.zeros(1, length, 3, dtype=torch.int32),
        "document": document[None].to(torch.int32),
        "image": image[None],
        "patches": torch.zeros(image_tokens, 4, 768, dtype=torch.uint8),
        "image_token_index": torch.nonzero(image >= 0).flatten(),
        "target_index": targets - 1,
        "targets": torch.zeros(trained, dtype=torch.int64),
        "target_weight": torch.ones(trained),
    }


class Wire(TorchDispatchMode):
    """Adds up what a rank sends in collectives, as rings do it."""

    sent = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("c10d.").split(".")[0]
        if name == "allreduce_":
            self.sent += 2 * part(args[1]) * sum(tensor.nbytes for tensor in args[0])
        elif name in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"):
            self.sent += part(args[2]) * max(args[0].nbytes, args[1].nbytes)
        elif name in ("allgather_", "reduce_scatter_"):
            (of_ranks,) = args[0] if name == "allgather_" else args[1]
            self.sent += part(args[2]) * sum(tensor.nbytes for tensor in of_ranks)
        else:
            assert not str(func).startswith("c10d."), func
        done = func(*args, **(kwargs or {}))
        if name in ("_reduce_scatter_base_", "alltoall_base_", "allgather_", "reduce_scatter_"):
            # No process has written what is received; in what is left in memory there may be no numbers.
            for tensor in tree_leaves(args[0]):
                tensor.zero_()
        return done


def part(group: torch.ScriptObject) -> float:
    """Share of a tensor that a rank sends on its way around a group."""
    ranks = torch.distributed.ProcessGroup.unbox(group).size()
    return (ranks - 1) / ranks


def even(gating):
    """Logits of a router that deals tokens to experts in turn."""

    def dealt(router, hidden):
        logits = gating(router, hidden)
        tokens, experts = logits.shape[:-1].numel(), logits.shape[-1]
        chosen = torch.arange(tokens * router.topk).view(tokens, router.topk) % experts
        return logits + 1000 * torch.zeros(tokens, experts).scatter_(1, chosen, 1.0).view_as(logits)

    return dealt


def count(case: dict) -> tuple[int, float]:
    tensor, context, experts = case["tensor"], case["context"], case["experts"]
    expert_tensor = case["expert_tensor"] or tensor
    world_size = math.lcm(tensor * context, experts * expert_tensor)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    parallel_state.initialize_model_parallel(
        tensor,
        context_parallel_size=context,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=expert_tensor,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    settings = dict(case["settings"])
    if settings.get("bf16"):
        settings |= {"params_dtype": torch.bfloat16}
    config = NeoConfig.from_sizes(
        NeoSizes(**case["sizes"]),
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        tensor_model_parallel_size=tensor,
        context_parallel_size=context,
        expert_model_parallel_size=experts,
        expert_tensor_parallel_size=expert_tensor,
        **settings,
    )
    model = NeoModel(config).train()
    freeze_for_stage(model, case["stage"])
    sequence_ranks = tensor if config.sequence_parallel else 1
    share = packs(*case["batch"])
    if context > 1:
        share = context_share(share, 0, context, gather_keys=config.cp_comm_type == "allgather")
    has_experts = bool(config.num_moe_experts)
    inputs = model_inputs(share, first_stage=True, last_stage=True, sequence_ranks=sequence_ranks, experts=has_experts)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage()._cdata not in own:
            kept[saved.untyped_storage()._cdata] = saved
        return saved

    before = {id(thing) for thing in gc.get_objects()}
    with Wire() as wire, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        loss = model(**inputs).sum()
    # What autograd does not save but functions to be run again hold on to: the context of a micro-batch.
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and id(thing) not in before and thing.untyped_storage()._cdata not in own:
            kept[thing.untyped_storage()._cdata] = thing
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    with wire:
        loss.backward()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found, wire.sent


if __name__ == "__main__":
    ExpertRouter.gating = even(ExpertRouter.gating)
    # What Megatron sends, not what stands in for it under gloo.
    for name in ("_gather_along_first_dim", "_reduce_scatter_along_first_dim"):
        setattr(mappings, name, getattr(mappings, name).__wrapped__)
    gc.freeze()  # `count` looks at all objects but those of the imports
    print(json.dumps([count(case) for case in json.loads(sys.argv[1])]))
