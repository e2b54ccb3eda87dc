"""Runs both models on a pack and names what they compute: float32 tensors with one row for every token.

Names, in the order of the forward pass: ``patch embedding``, ``layer N`` for every layer, ``final norm``, ``logits``,
``loss``. Either model is built without weights and reads them part by part, Hugging Face's by the names that its
modules have in the exported code, Megatron's as `--load` does, by its own sharded state dict.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor, nn

from neo_megatron.checkpoint.names import LM_HEAD, WORD_EMBEDDING
from neo_megatron.checkpoint.neo_directory import NeoDirectory
from neo_megatron.checkpoint.reader import MegatronNeo
from neo_megatron.errors import CheckpointError
from neo_megatron.hf.configuration_neo import NEOChatConfig
from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.parity.pack import MadePack
from neo_megatron.parity.streaming import keep_output, stream_weights

Seen = dict[str, Tensor]


def check_same_sizes(neo: NeoDirectory, megatron: MegatronNeo) -> None:
    """Rejects checkpoints that cannot be compared.

    Raises:
        CheckpointError: two models.
    """
    here, there = dataclasses.asdict(neo.sizes), dataclasses.asdict(megatron.sizes)
    if differing := [f"{key} ({here[key]}, {there[key]})" for key in here if here[key] != there[key]]:
        raise CheckpointError(
            f"{neo.source.directory} and {megatron.source.directory} differ in {', '.join(differing)}: "
            "give two forms of one model"
        )


def run_transformers(neo: NeoDirectory, pack: MadePack, device: str) -> Seen:
    """The exported model's code over the tensors of a Hugging Face directory, every document by itself."""
    with torch.device("meta"):
        model = NEOChatModel(NEOChatConfig(**neo.config)).float().eval()
    tied = model.config.tie_word_embeddings

    def read(name: str) -> Tensor:
        tensor = torch.empty(neo.source.shapes[name], dtype=torch.float32)
        neo.source.read_into(name, tensor)
        return tensor

    def weights_of(prefix: str, part: nn.Module) -> Callable[[], Seen]:
        def weights() -> Seen:
            stored = {name: WORD_EMBEDDING if tied and prefix + name == LM_HEAD else prefix + name for name in names}
            return {name: read(at).to(device) for name, at in stored.items()}

        names = list(part.state_dict())
        return weights

    seen: Seen = {}
    decoder = model.language_model.model
    parts = {"vision_model.": model.vision_model, "language_model.lm_head.": model.language_model.lm_head}
    parts |= {f"language_model.model.{name}.": getattr(decoder, name) for name in ("embed_tokens", "norm")}
    parts |= {f"language_model.model.layers.{number}.": layer for number, layer in enumerate(decoder.layers)}
    for prefix, part in parts.items():
        stream_weights(part, weights_of(prefix, part))
    keep_output(model.vision_model, "patch embedding", seen)
    for number, layer in enumerate(decoder.layers):
        keep_output(layer, f"layer {number}", seen)
    keep_output(decoder.norm, "final norm", seen)
    inputs = {name: value.to(device) for name, value in pack.for_transformers().items()}
    with torch.no_grad():
        output = model(**inputs, use_cache=False)
    seen["logits"] = output.logits.cpu()
    real = inputs["attention_mask"].bool().cpu()
    # Rows are documents padded on the left: read without padding they are the pack.
    of_tokens = {name: value[real] for name, value in seen.items() if name != "patch embedding"}
    return {"patch embedding": seen["patch embedding"], **of_tokens, "loss": output.loss.cpu().reshape(1)}


def run_megatron(sizes: NeoSizes, iteration: Path, pack: MadePack, device: str) -> Seen:
    """Megatron's model over the tensors of one saved iteration, all documents in one pack."""
    config = NeoConfig.from_sizes(
        sizes,
        transformer_impl="local",
        gradient_accumulation_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=True,  # otherwise Megatron names a device, and no memory is to be taken yet
    )
    with torch.device("meta"):
        model = NeoModel(config).float().eval()
    parts = {"embedding.": model.embedding, "patch_embedding.": model.patch_embedding}
    parts |= {f"decoder.layers.{number}.": layer for number, layer in enumerate(model.decoder.layers)}
    parts |= {"decoder.final_layernorm.": model.decoder.final_layernorm}
    if not sizes.tie_word_embeddings:
        parts["output_layer."] = model.output_layer

    def weights_of(prefix: str, part: nn.Module) -> Callable[[], Seen]:
        def weights() -> Seen:
            part.to_empty(device=device)
            wanted = {name: value for name, value in model.sharded_state_dict().items() if name.startswith(prefix)}
            loaded = dist_checkpointing.load(dict(wanted), str(iteration))
            return {name.removeprefix(prefix): loaded[name] for name in wanted}

        return weights

    seen: Seen = {}
    for prefix, part in parts.items():
        stream_weights(part, weights_of(prefix, part), keep=sizes.tie_word_embeddings and part is model.embedding)
    keep_output(model.patch_embedding, "patch embedding", seen)
    for number, layer in enumerate(model.decoder.layers):
        keep_output(layer, f"layer {number}", seen)
    keep_output(model.decoder.final_layernorm, "final norm", seen)
    keep_output(model.output_layer, "logits", seen)
    every_token = torch.arange(pack.packed["tokens"].numel())
    packed = {**pack.packed, "target_index": every_token, "targets": pack.packed["tokens"].roll(-1)[0]}
    inputs = model_inputs(packed, first_stage=True, last_stage=True)
    with torch.no_grad():
        token_loss = model(**{name: value.to(device) for name, value in inputs.items()}).cpu()
    weight = pack.packed["target_weight"]
    loss = (token_loss[pack.packed["target_index"]] * weight).sum() / weight.sum()
    of_tokens = {name: value.reshape(-1, value.shape[-1])[: pack.length] for name, value in seen.items()}
    return {**of_tokens, "patch embedding": seen["patch embedding"], "loss": loss.reshape(1)}
