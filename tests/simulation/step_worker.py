"""One step of a training on a GPU that is not there, as one rank of many, next to its plan.

    python tests/simulation/step_worker.py RANK RANKS FLAGS_OF_PRETRAIN_NEO

Megatron builds the model with its gradient buffers and the optimizer, and its schedule runs all micro-batches of a
step, up to the reduced gradients. Stand-ins are the process groups, the kernels of attention, which keep what they keep
on a GPU, and Transformer Engine's products and norms; our own kernel is not launched. Prints as JSON:

    state, peak            bytes of parameters, gradients and optimizer; most bytes in the step
    sent                   bytes that the rank sends, by kind as `planning.communication.Traffic`
    planned_state, planned_peak, planned_sent
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

rank, ranks = int(sys.argv[1]), int(sys.argv[2])
sys.argv[1:] = sys.argv[3:]
os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "TORCHDYNAMO_DISABLE": "1"}
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}

import simulated_gpu
import torch
from simulated_gpu import Gpu, on_host, simulation

simulated_gpu.install()

import megatron.core.fusions.fused_bias_swiglu as swiglu
import megatron.core.optimizer as optimizers
import megatron.core.tensor_parallel.random as random
from megatron.core import parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training import training
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model import core_attention
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.gpu_kernels import norm_rotary
from neo_megatron.planning.communication import rank_traffic
from neo_megatron.planning.layout import Layout, precision_of
from neo_megatron.planning.memory import pipeline_memory
from neo_megatron.planning.workload import Workload, mean_keys
from neo_megatron.run import pretraining
from neo_megatron.run.loss_sums import LossSums
from neo_megatron.run.stragglers import Stragglers
from neo_megatron.run.training_arguments import parse_arguments

gpu = Gpu()


class Attention(torch.autograd.Function):
    """FlexAttention's kernels: what they take and keep. The backward has one more number for each row."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        packs, heads, rows, _ = query.shape
        out = query.new_empty(rows, packs, heads, value.shape[-1]).permute(1, 2, 0, 3)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, log_sum_exp = ctx.saved_tensors
        _delta = torch.empty_like(log_sum_exp)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def stand_in() -> None:
    """Puts stand-ins in place of kernels, of random numbers and of messages between processes."""
    core_attention._compiled_flex_attention = lambda: lambda query, key, value, **_: Attention.apply(query, key, value)
    norm_rotary.launch_forward = norm_rotary.launch_backward = lambda *_: None
    swiglu.swiglu, swiglu.swiglu_back = map(gpu.as_kernel, (swiglu.swiglu, swiglu.swiglu_back))
    random._set_cuda_rng_state = lambda *_, **__: None
    random.CudaRNGStatesTracker.fork = lambda *_: simulated_gpu.contextlib.nullcontext()
    random._get_share_storage = lambda: gpu.share
    # Its state is laid out as that of the fused optimizers.
    optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = cpu_platform.Adam, False
    optimizers.distrib_optimizer.HAVE_APEX_OR_TE = optimizers.distrib_optimizer.USING_APEX_OPTIMIZER = True
    distributed = torch.distributed
    distributed.all_gather_object = lambda out, mine, **_: out.__setitem__(slice(None), [mine] * len(out))
    distributed.broadcast_object_list = distributed.barrier = lambda *_, **__: None
    # The data's side runs on real tensors of the host.
    pretraining.model_inputs, pretraining.context_share = map(
        on_host, (pretraining.model_inputs, pretraining.context_share)
    )
    pretraining._log = SimpleNamespace(
        note=lambda _: None, watch=lambda _: None, note_loss=LossSums().add, stragglers=Stragglers(0, 1)
    )


def stand_in_for_transformer_engine() -> None:
    sys.path.insert(0, str(simulated_gpu.TESTS))
    from support import te_on_cpu as te

    product, norm, norm_backward = map(gpu.as_kernel, (te._product, te._norm, te._norm_backward))
    te.te_linear.general_gemm = te.te_layernorm_linear.general_gemm = product
    for owner in (te.te_common.tex, te.te_layernorm_linear.tex, te.te_rmsnorm):
        owner.rmsnorm_fwd, owner.rmsnorm_bwd = norm, norm_backward


def workload_of(packs: list[dict], length: int) -> Workload:
    """That of these packs, as `planning.packs` finds it in an index."""
    documents: list[int] = []
    images: list[int] = []
    for pack in packs:
        document, image = pack["document"][0], pack["image"][0]
        documents += torch.bincount(document[document >= 0]).tolist() + [1] * int((document < 0).sum())
        images += torch.bincount(image[image >= 0]).tolist()
    trained = sum(len(pack["targets"]) for pack in packs)
    tokens = len(packs) * length
    return Workload(length, mean_keys(documents, images), sum(images) / tokens, trained / tokens)


def kinds() -> dict[tuple[str, str], str]:
    """What is sent, by operation and group."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "state": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "embedding": parallel_state.get_embedding_group(check_initialized=False),
    }
    named = {group.group_name: kind for kind, group in groups.items() if group is not None and group.size() > 1}
    found = {}
    for operation, name in gpu.sent:
        kind = named.get(name, "other")
        if kind == "state":
            kind = "parameters" if "gather" in operation else "gradients"
        found[operation, name] = "pipeline" if operation == "send" else kind
    return found


def main() -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    args = parse_arguments()
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        create_gloo_process_groups=False,
    )
    stand_in()
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    if args.transformer_impl == "transformer_engine":
        stand_in_for_transformer_engine()
    sizes = NeoSizes(**args.neo_sizes)
    packs = draw_packs(sizes, args.seq_length, get_num_microbatches(), seed=0)
    for pack in packs:
        pack.update(packs=[0], describe=str, again=lambda: None, data_sets=("drawn",))
    args.curr_iteration = 0
    with simulation(gpu):
        build = partial(
            pretraining.model_provider,
            run_checkpoints=SimpleNamespace(start=lambda: None, look=lambda: None),
            tiles=SimpleNamespace(options=None),
        )
        model, optimizer, _ = training.setup_model_and_optimizer(
            ModelType.encoder_or_decoder, build, pg_collection=ProcessGroupCollection.use_mpu_process_groups()
        )
        groups = [group for one in optimizer.chained_optimizers for group in one.param_groups]
        _moments = [torch.empty_like(p) for group in groups for p in group["params"] for _ in range(2)]
        state = gpu.peak = gpu.bytes
        gpu.sent.clear()
        config = get_model_config(model[0])
        config.grad_scale_func, config.timers = optimizer.scale_loss, None
        no_sync = [chunk.no_sync for chunk in model]
        config.no_sync_func = no_sync if len(model) > 1 else no_sync[0]
        for chunk in model:
            chunk.train()
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        gpu.stepping = True
        iterators = [iter(packs) for _ in model]

        def compute(iterator) -> None:
            get_forward_backward_func()(
                forward_step_func=pretraining.forward_step,
                data_iterator=iterator,
                model=model,
                num_microbatches=get_num_microbatches(),
                seq_length=args.seq_length,
                micro_batch_size=args.micro_batch_size,
                forward_only=False,
            )

        pretraining._bad_numbers.step(compute, iterators if len(model) > 1 else iterators[0], model)
    sent: Counter[str] = Counter()
    for where, kind in kinds().items():
        sent[kind] += gpu.sent[where]
    layout = Layout.from_arguments(args, precision_of(args))
    workload = workload_of(packs, args.seq_length)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    memory = pipeline_memory(sizes, layout, workload, args.training_stage)[stage]
    traffic = rank_traffic(sizes, layout, workload, args.training_stage, stage)
    print(
        json.dumps(
            {
                "state": state,
                "planned_state": memory.state.total,
                "peak": gpu.peak,
                "planned_peak": memory.total,
                "sent": sent,
                "planned_sent": asdict(traffic),
            }
        )
    )


if __name__ == "__main__":
    main()
