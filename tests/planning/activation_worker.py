"""Counts the bytes that a real model keeps for its backward pass, on a CPU under a fake process group.

Arguments: a JSON list of {"sizes", "stage", "tensor", "settings" of NeoConfig, "batch" as in `count`}. The last line
printed is the JSON list of bytes.
"""

import gc
import json
import sys

import torch

from neo_megatron import cpu_platform

cpu_platform.install()

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from neo_megatron.model.config import NeoSizes
from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig


def packs(length: int, cells: int, trained: int) -> dict[str, torch.Tensor]:
    """One pack of one document that begins with one picture; the last `trained` tokens are trained."""
    image = torch.where(torch.arange(length) < cells, 0, -1).to(torch.int32)
    return {
        "tokens": torch.zeros(1, length, dtype=torch.int64),
        "positions_thw": torch.zeros(1, length, 3, dtype=torch.int32),
        "document": torch.zeros(1, length, dtype=torch.int32),
        "image": image[None],
        "patches": torch.zeros(cells, 4, 768, dtype=torch.uint8),
        "cell_index": torch.arange(cells),
        "target_index": torch.arange(length - trained, length),
        "targets": torch.zeros(trained, dtype=torch.int64),
        "target_weight": torch.ones(trained),
    }


def count(case: dict) -> int:
    tensor = case["tensor"]
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=tensor)
    parallel_state.initialize_model_parallel(tensor, create_gloo_process_groups=False)
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
        **settings,
    )
    model = NeoModel(config).train()
    freeze_for_stage(model, case["stage"])
    sequence_ranks = tensor if config.sequence_parallel else 1
    inputs = model_inputs(packs(*case["batch"]), first_stage=True, last_stage=True, sequence_ranks=sequence_ranks)
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        if saved.untyped_storage()._cdata not in own:
            kept[saved.untyped_storage()._cdata] = saved
        return saved

    before = {id(thing) for thing in gc.get_objects()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        loss = model(**inputs).sum()
    # What autograd does not save but functions to be run again hold on to: the context of a micro-batch.
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and id(thing) not in before and thing.untyped_storage()._cdata not in own:
            kept[thing.untyped_storage()._cdata] = thing
    found = sum(saved.untyped_storage().nbytes() for saved in kept.values())
    del loss
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps([count(case) for case in json.loads(sys.argv[1])]))
