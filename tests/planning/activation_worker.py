"""Counts bytes that a real model keeps for its backward pass and sends, on a CPU under a fake process group.

Arguments: a JSON list of {"sizes", "stage", "tensor", "context", "settings" of NeoConfig, "batch" as in `packs`}. The
last line printed is the JSON list of [bytes kept between forward and backward, bytes sent in both].
"""

import gc
import json
import sys

import torch

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from neo_megatron.model.config import NeoSizes
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
    """Adds up what a rank sends in collectives over all of the `ranks`, as rings do it."""

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.part, self.sent = (ranks - 1) / ranks, 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("c10d.").split(".")[0]
        if name == "allreduce_":
            self.sent += 2 * self.part * sum(tensor.nbytes for tensor in args[0])
        elif name in ("_allgather_base_", "_reduce_scatter_base_", "alltoall_base_"):
            self.sent += self.part * max(args[0].nbytes, args[1].nbytes)
        else:
            assert not str(func).startswith("c10d."), func
        return func(*args, **(kwargs or {}))


def count(case: dict) -> tuple[int, float]:
    tensor, context = case["tensor"], case["context"]
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor * context)
    parallel_state.initialize_model_parallel(tensor, context_parallel_size=context, create_gloo_process_groups=False)
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
        **settings,
    )
    model = NeoModel(config).train()
    freeze_for_stage(model, case["stage"])
    sequence_ranks = tensor if config.sequence_parallel else 1
    share = packs(*case["batch"])
    if context > 1:
        share = context_share(share, 0, context, gather_keys=config.cp_comm_type == "allgather")
    inputs = model_inputs(share, first_stage=True, last_stage=True, sequence_ranks=sequence_ranks)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage()._cdata not in own:
            kept[saved.untyped_storage()._cdata] = saved
        return saved

    before = {id(thing) for thing in gc.get_objects()}
    with Wire(tensor * context) as wire, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
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
    gc.freeze()  # `count` looks at all objects but those of the imports
    print(json.dumps([count(case) for case in json.loads(sys.argv[1])]))
