"""The plan of a run, as `neo-megatron plan` would make it, from the arguments that the run has."""

from argparse import Namespace

import torch

from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model.config import NeoSizes
from neo_megatron.planning.hardware import GPUS, Gpu, gpu_named
from neo_megatron.planning.layout import Layout, precision_of
from neo_megatron.planning.report import Plan
from neo_megatron.planning.workload import Workload
from neo_megatron.run.module_rates import stage_at_work

# Flags of pipeline splits that only Megatron can compute.
_UNPLANNED = (
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
)


def can_plan(args: Namespace) -> bool:
    """Whether the pipeline is split as `Layout` can say."""
    return not any(getattr(args, flag) for flag in _UNPLANNED)


def plan_of(args: Namespace, workload: Workload, gpu: Gpu) -> Plan:
    """The plan of a run."""
    layout = Layout.from_arguments(args, precision_of(args))
    return Plan.make(NeoSizes(**args.neo_sizes), layout, workload, stage_at_work(args), gpu)


def gpu_to_plan_for() -> tuple[Gpu, str]:
    """The GPU of this machine or, without one of known rates, an H100, with a sentence that says so."""
    if cpu_platform.on_cpu():
        return GPUS["h100"], "no GPU here: planned for h100"
    device = torch.cuda.get_device_properties(0)
    gpu = gpu_named(device.name)
    if gpu is not None:
        return gpu.with_memory(device.total_memory), ""
    return GPUS["h100"].with_memory(device.total_memory), f"{device.name} has no stated rates: time is planned for h100"
