"""Runs `train()` of run/pretraining.py many times in one set of torchrun processes, once for every job of a file.

    torchrun --nproc-per-node N pretrain_worker.py JOBS.json

The file is written by `pretrain_jobs.run_jobs`: a list of {"argv", "directory", "gradients", "spoilt"}. Importing
Megatron costs more than most jobs do. Nothing is mocked, but for packs that are spoilt: between two jobs everything
global is put back as it is on import, but for the default process group, which Megatron takes over as it finds it.

In its directory every rank of a job leaves `rank<N>.log`, all that it printed, and rank 0 `result.json` with `exit`,
what the job ended with: null, or the code or sentence given to `sys.exit`, and how many passes rank 0
made over gradients: `checks` of a bucket's norm, `scalings` of a buffer. Where gradients are asked for, those of the
last step, before they are clipped, are in `rank<N>.gradients.safetensors`, each part under the name of its tensor.
`rank<N>.inputs.json` lists what each call of the model was given: the name of every tensor and its first dimension.
`rank<N>.stored.json` lists the tensors, with the offset of each part, that the rank has `read` from checkpoints, and
those of the distributed optimizer that it was given to write (`written`), and says how often it has `listed` files.
"""

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install_training()

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup, _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.utils import unwrap_model
from megatron.training import async_utils, checkpointing, global_vars, training
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.planner import LoadItemType

from neo_megatron.checkpoint import dcp_metadata
from neo_megatron.data.dataset import PackDataset
from neo_megatron.megatron_compat import fsdp, optimizer_saves, steps
from neo_megatron.model.loss import WeightedLoss
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.run import pretraining


class GradientRecorder:
    """Keeps the gradients of the last step: reduced over all ranks and normalised, not yet clipped."""

    def __init__(self) -> None:
        self.model: list[DistributedDataParallel] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        original = WeightedLoss.finalize_model_grads

        def finalize_model_grads(loss: WeightedLoss, model: list[torch.nn.Module], num_tokens, **groups) -> None:
            original(loss, model, num_tokens, **groups)
            scale = steps.pending_scale()  # left to clipping
            scale = 1 if scale is None else scale
            self.model = model
            self.gradients = [
                {name: gradient * scale for name, gradient in whole_gradients(chunk).items()} for chunk in model
            ]

        WeightedLoss.finalize_model_grads = finalize_model_grads
        self.uninstall = lambda: setattr(WeightedLoss, "finalize_model_grads", original)

    def save(self, file: Path) -> None:
        """This rank's parts; the model's own checkpoint description says of what, and where. The model is spent."""
        parts, places = {}, {}
        for chunk, gradients in zip(self.model, self.gradients, strict=True):
            module = unwrap_model(chunk)
            if isinstance(chunk, FullyShardedDataParallel):
                for shard in fsdp.shards(chunk).values():
                    shard.model.copy_(gradients.get(shard.main, torch.zeros_like(shard.model)))
            else:
                for name, parameter in module.named_parameters():
                    parameter.data = gradients.get(name, torch.zeros_like(parameter))
            state = module.sharded_state_dict()
            apply_factories(state)
            for tensor in nested_values(state):
                if is_main_replica(tensor.replica_id):
                    name = f"part{len(parts)}"
                    parts[name] = tensor.data.detach()[(None,) * tensor.prepend_axis_num].contiguous()
                    places[name] = json.dumps([tensor.key, tensor.global_shape, tensor.global_offset])
        if parts:  # else other ranks hold the same
            save_file(parts, file, metadata=places)


class InputRecorder:
    """Notes what the model is given."""

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []
        original = NeoModel.forward

        def forward(model: NeoModel, **inputs: torch.Tensor) -> torch.Tensor:
            self.calls.append({name: len(tensor) for name, tensor in inputs.items()})
            return original(model, **inputs)

        NeoModel.forward = forward
        self.uninstall = lambda: setattr(NeoModel, "forward", original)


class PassRecorder:
    """Counts the passes over gradients: of each bucket, to look at its norm, and of a buffer, to scale it."""

    def __init__(self) -> None:
        self.checks = self.scalings = 0
        check, scale = _ParamAndGradBucketGroup.check_grads, _ParamAndGradBuffer.scale_gradients

        def check_grads(buckets: _ParamAndGradBucketGroup, **checks) -> None:
            self.checks += 1
            check(buckets, **checks)

        def scale_gradients(buffer: _ParamAndGradBuffer, factor: torch.Tensor) -> None:
            self.scalings += 1
            scale(buffer, factor)

        _ParamAndGradBucketGroup.check_grads = check_grads
        _ParamAndGradBuffer.scale_gradients = scale_gradients

        def uninstall() -> None:
            _ParamAndGradBucketGroup.check_grads = check
            _ParamAndGradBuffer.scale_gradients = scale

        self.uninstall = uninstall


class StorageRecorder:
    """Notes which parts of tensors this rank reads from storage, and which of the optimizer it holds to write."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.written: list[str] = []
        self.listed = 0
        check = dcp_metadata._checked_ends
        read, state = FileSystemReader.read_data, DistributedOptimizer.sharded_param_state_fully_reshardable

        def read_data(reader, plan, planner):
            tensors = [item.dest_index for item in plan.items if item.type is LoadItemType.TENSOR]
            self.read += [f"{index.fqn} {tuple(index.offset)}" for index in tensors]
            return read(reader, plan, planner)

        def sharded_state(optimizer, model_state, is_loading=False, metadata=None):
            state_dict = state(optimizer, model_state, is_loading, metadata)
            if not is_loading:
                self.written += [entry.key for entry in nested_values(state_dict or {})]
            return state_dict

        def checked_ends(metadata):
            self.listed += 1
            return check(metadata)

        dcp_metadata._checked_ends = checked_ends
        FileSystemReader.read_data = read_data
        DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_state

        def uninstall() -> None:
            dcp_metadata._checked_ends = check
            FileSystemReader.read_data = read
            DistributedOptimizer.sharded_param_state_fully_reshardable = state

        self.uninstall = uninstall


@contextlib.contextmanager
def spoilt_packs(numbers: list[int], weight: float, times: int) -> Iterator[None]:
    """Gives the trained tokens of these packs a weight, such as NaN, in the first ``times`` that a pack is read."""
    original, read = PackDataset.__getitem__, dict.fromkeys(numbers, 0)

    def get(dataset: PackDataset, number: int) -> dict:
        item, number = original(dataset, number), dataset.pack(number).number
        # The plan for trackers measures packs without images; a rank that computes losses at least checks them.
        if number not in read or read[number] == times or dataset._images == "none":
            return item
        read[number] += 1
        return {**item, "target_weight": torch.full_like(item["target_weight"], weight)}

    PackDataset.__getitem__ = get
    yield
    PackDataset.__getitem__ = original


def whole_gradients(chunk: DistributedDataParallel) -> dict[str, torch.Tensor]:
    """Gradients keyed by parameter.

    Under the distributed optimizer a rank holds a reduced shard of every bucket, so they are gathered. Under FSDP it
    holds rows of every parameter, which are kept, keyed by the optimizer's parameter.
    """
    if isinstance(chunk, FullyShardedDataParallel):
        mains = [shard.main for shard in fsdp.shards(chunk).values()]
        return {main: main.grad.to_local().flatten().clone() for main in mains if main.grad is not None}
    if chunk.ddp_config.use_distributed_optimizer:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                shard = bucket.grad_data.view(group.size(), -1)[group.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, shard, group=group)
    named = unwrap_model(chunk).named_parameters()
    return {name: p.main_grad.detach().float().clone() for name, p in named if p.requires_grad}


def run(job: dict) -> None:
    directory = Path(job["directory"])
    recorder, inputs = GradientRecorder() if job["gradients"] else None, InputRecorder()
    stored, passes = StorageRecorder(), PassRecorder()
    sys.argv = ["pretrain_neo", *job["argv"]]
    code = None
    spoilt = spoilt_packs(*job["spoilt"]) if job["spoilt"] else contextlib.nullcontext()
    with spoilt, printing_to(directory / f"rank{os.environ['RANK']}.log"):
        try:
            pretraining.train()
            if recorder:
                recorder.save(directory / f"rank{os.environ['RANK']}.gradients.safetensors")
        except SystemExit as stop:  # anything else ends all processes: another rank may be waiting for this one
            code = stop.code
        if recorder:
            recorder.uninstall()
        inputs.uninstall()
        stored.uninstall()
        passes.uninstall()
        reset()
    (directory / f"rank{os.environ['RANK']}.inputs.json").write_text(json.dumps(inputs.calls))
    (directory / f"rank{os.environ['RANK']}.stored.json").write_text(
        json.dumps({"read": stored.read, "written": stored.written, "listed": stored.listed})
    )
    if os.environ["RANK"] == "0":
        (directory / "result.json").write_text(
            json.dumps({"exit": code, "checks": passes.checks, "scalings": passes.scalings})
        )


def reset() -> None:
    """Megatron's and our globals as they are on import."""
    if global_vars._GLOBAL_SIGNAL_HANDLER:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    training.destroy_global_state()
    initialize_rng_tracker(force_reset=True)
    checkpointing._CHECKPOINT_VERSION = checkpointing._LOADED_ITERATION = None
    async_utils._async_calls_queue = None
    pretraining._loss = WeightedLoss()
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # none tears down what another still uses
        world = torch.distributed.group.WORLD
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not world:
                torch.distributed.destroy_process_group(group)


@contextlib.contextmanager
def printing_to(path: Path) -> Iterator[None]:
    """Sends stdout and stderr of this process, libraries in C++ included, to a file; on an error its end is shown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(1), os.dup(2)]
    with path.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    failed = True
    try:
        yield
        failed = False
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        if failed:
            print(f"{path} ends with:\n{path.read_text()[-4000:]}", flush=True)


if __name__ == "__main__":
    optimizer_saves._MOST = 1000  # small models are gathered in several parts, too
    gc.freeze()  # imported objects are not garbage between jobs
    for next_job in json.loads(Path(sys.argv[1]).read_text()):
        run(next_job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
