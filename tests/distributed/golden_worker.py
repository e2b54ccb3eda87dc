"""Runs the golden models on several layouts inside one set of torchrun processes and writes what they computed.

    torchrun --nproc-per-node N golden_worker.py DIRECTORY MODEL/LAYOUT ...     MODEL: neo, ...    LAYOUT: tp2-sp, ...

DIRECTORY holds the checkpoint of each model in Megatron's form.

In a layout that is called chunked the head takes 16 trained positions at a time.

Weights come in, and gradients go out, through Megatron's distributed checkpoints: the same road as in training, so
that parameter names and their splits are under test too.
"""

import dataclasses
import re
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()
sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own packages

from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel import get_forward_backward_func
from support.golden_models import MODELS
from support.paths import GOLDEN

from neo_megatron.data.image import IMAGE_MEAN, IMAGE_STD
from neo_megatron.model import head_loss
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.loss import WeightedLoss
from neo_megatron.model.micro_batch import context_share, model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig


def golden_packs(name: str, weighting: str) -> dict[str, torch.Tensor]:
    """The published collator's output in the form of `neo_megatron.data.dataset.collate`."""
    golden = load_file(GOLDEN / f"inputs_{name}.safetensors")
    tokens, labels = golden["input_ids"], golden["labels"]
    length = tokens.shape[1]
    document = torch.searchsorted(golden["seq_boundaries"][1:].long(), torch.arange(length), right=True)
    context = tokens[0] == 896  # <IMG_CONTEXT> of the golden tokenizer
    starts = context & ~torch.cat((torch.tensor([False]), context[:-1]))
    image = torch.where(context, starts.cumsum(0) - 1, -1)
    trained = torch.nonzero(labels[1:] != -100).squeeze(1)
    return {
        "tokens": tokens,
        "positions_thw": golden["positions_thw"][None].int(),
        "document": document[None].int(),
        "image": image[None].int(),
        "patches": block_order_uint8(golden),
        "image_token_index": torch.nonzero(context).squeeze(1),
        "target_index": trained,
        "targets": labels[1:][trained],
        "target_weight": golden[f"loss_weight_{weighting}"][1:][trained],
    }


def block_order_uint8(golden: dict[str, torch.Tensor]) -> torch.Tensor:
    """Normalised row-major patches ``[P, 768]`` -> uint8 ``[P / 4, 4, 768]`` in 2x2-block order."""
    if "pixel_values" not in golden:
        return torch.zeros(0, 4, 768, dtype=torch.uint8)
    mean, std = torch.tensor(IMAGE_MEAN)[:, None], torch.tensor(IMAGE_STD)[:, None]
    pixels = ((golden["pixel_values"].unflatten(1, (3, 256)) * std + mean) * 255).flatten(1)
    assert (pixels - pixels.round()).abs().max() < 1e-3
    cells, start = [], 0
    for height, width in golden["grid_hw"].tolist():
        image = pixels[start : start + height * width].view(height // 2, 2, width // 2, 2, 768)
        cells.append(image.transpose(1, 2).reshape(-1, 4, 768))
        start += height * width
    return torch.cat(cells).round().to(torch.uint8)


def build(layout: str, sizes: NeoSizes) -> NeoModel:
    """This rank's part of the golden model on a layout such as ``tp2-pp2-sp``."""
    degree = {kind: int(size) for kind, size in re.findall(r"(tp|pp|cp|ep)(\d)", layout)}
    tensor, pipeline, context, expert = (degree.get(kind, 1) for kind in ("tp", "pp", "cp", "ep"))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor,
        pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = NeoConfig.from_sizes(
        sizes,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=1,
        pipeline_dtype=torch.float32,
        sequence_parallel="sp" in layout,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        # A golden model has five layers: its two pre-buffer layers get the first pipeline stage.
        num_layers_in_first_pipeline_stage=sizes.pre_buffer_layers if pipeline > 1 else None,
    )
    return NeoModel(
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )


def run(name: str, layout: str, directory: Path) -> None:
    golden, checkpoint, out = MODELS[name], directory / name / "checkpoint" / "release", directory / name
    sizes = golden.sizes
    model = build(layout, sizes)
    config = model.config
    wanted = model.sharded_state_dict()
    loaded = dist_checkpointing.load(dict(wanted), str(checkpoint))
    model.load_state_dict({name: loaded[name] for name in wanted}, strict=True)
    arguments = Namespace(neo_sizes=dataclasses.asdict(sizes))
    save({"model": model.sharded_state_dict(), "args": arguments}, out / layout / "saved")
    loss = WeightedLoss()
    config.finalize_model_grads_func = loss.finalize_model_grads
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    tensors = parallel_state.get_tensor_model_parallel_world_size()
    contexts = parallel_state.get_context_parallel_world_size()
    if "chunked" in layout:
        head_loss.LOGIT_BYTES = 16 * 4 * sizes.vocab_size // tensors
    results = Results()

    def step(packs: dict[str, torch.Tensor], forward_only: bool) -> torch.Tensor | None:
        if contexts > 1:
            packs = context_share(packs, parallel_state.get_context_parallel_rank(), contexts, gather_keys=False)
        inputs = model_inputs(
            packs,
            first_stage=model.pre_process,
            last_stage=model.post_process,
            sequence_rank=parallel_state.get_tensor_model_parallel_rank() if config.sequence_parallel else 0,
            sequence_ranks=tensors if config.sequence_parallel else 1,
        )
        with torch.set_grad_enabled(not forward_only):  # as Megatron evaluates
            report = get_forward_backward_func()(
                forward_step_func=lambda _, chunk: (chunk(**inputs), lambda nll: loss(packs["target_weight"], nll)),
                data_iterator=None,
                model=wrapped,
                num_microbatches=1,
                seq_length=packs["tokens"].shape[1] * contexts,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        if not report:
            return None
        torch.distributed.all_reduce(report[0]["lm loss"], group=parallel_state.get_context_parallel_group())
        return report[0]["lm loss"]

    wrapped.zero_grad_buffer()
    for weighting in golden.losses:
        for pack in ("textonly", "pack1"):
            with_gradients = (pack, weighting) == ("pack1", golden.gradients_of)
            report = step(golden_packs(pack, weighting), forward_only=not with_gradients)
            if report is not None:
                results[f"{pack}.loss_{weighting}"] = report[0] / report[1]
    record(model, results)
    for pack in ("textonly", "pack1"):
        results.prefix = pack
        packs = golden_packs(pack, "square")
        all_positions = {**packs, "target_index": torch.arange(packs["tokens"].numel()), "targets": packs["tokens"][0]}
        step({**all_positions, "target_weight": torch.ones(packs["tokens"].numel())}, forward_only=True)
    for parameter in model.parameters():
        parameter.data = parameter.main_grad.clone()
    save(model.sharded_state_dict(), out / layout / "gradients")
    rank = torch.distributed.get_rank()
    save_file({k: v.detach().contiguous() for k, v in results.items()}, out / layout / f"rank{rank}.safetensors")


def save(state: dict[str, object], directory: Path) -> None:
    if torch.distributed.get_rank() == 0:
        directory.mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(directory))


class Results(dict[str, torch.Tensor]):
    """Results of one rank; `keep` files it under the golden file in work."""

    prefix = ""

    def keep(self, key: str, value: torch.Tensor) -> None:
        self[f"{self.prefix}.{key}"] = value.detach().clone()

    def append(self, key: str, value: torch.Tensor) -> None:
        """As `keep`, for what comes in several parts."""
        before = self.get(f"{self.prefix}.{key}")
        self.keep(key, value if before is None else torch.cat((before, value)))


def record(model: NeoModel, results: Results) -> None:
    """Hooks that keep the activations which the golden files have."""

    def output_of(module: torch.nn.Module, key: str) -> None:
        def hook(_module, _inputs, output):
            results.keep(key, output[0] if isinstance(output, tuple) else output)

        module.register_forward_hook(hook)

    if model.pre_process:
        output_of(model.patch_embedding.patch_projection, "vis_patch_conv")
        output_of(model.patch_embedding, "vit_embeds")
        model.decoder.register_forward_pre_hook(lambda _, inputs: results.keep("inputs_embeds", inputs[0]))
    for layer in model.decoder.layers:
        number, attention = layer.layer_number - 1, layer.self_attention

        def query_key_value(*inputs, number=number, original=attention.query_key_value):
            for letter, value in zip("qkv", outputs := original(*inputs), strict=True):
                results.keep(f"{letter}_layer_{number}", value)
            return outputs

        attention.query_key_value = query_key_value
        output_of(attention, f"attn_out_layer_{number}")
        output_of(layer.mlp, f"mlp_out_layer_{number}")
        output_of(layer, f"hidden_after_layer_{number}")
        if model.config.num_moe_experts:
            layer.mlp.router.register_forward_hook(partial(keep_routing, results, number))
    if model.post_process:
        output_of(model.decoder.final_layernorm, "final_norm")
        model.output_layer.register_forward_hook(lambda _, inputs, output: results.append("logits", output[0]))


def keep_routing(results: Results, number: int, _module, _inputs, output) -> None:
    """Weights and numbers of the experts of each token, as `forward` hooks of a router receive them."""
    weights, chosen = output
    results.keep(f"router_weight_layer_{number}", weights)
    results.keep(f"router_chosen_layer_{number}", chosen)


if __name__ == "__main__":
    directory, *cases = sys.argv[1:]
    torch.distributed.init_process_group("gloo")
    for case in cases:
        run(*case.split("/"), Path(directory))
    torch.distributed.destroy_process_group()
