"""One run of pretrain_neo that also writes the norms of its gradients, before clipping, to a file.

python examples/key_hw_init/run.py NORMS.jsonl {together,apart} FLAGS...

With `apart` the gradient of the keys is clipped by itself first.
"""

import json
import sys
from pathlib import Path

import torch

from neo_megatron.run import pretraining


def key_rows(weight: torch.Tensor, config) -> torch.Tensor:
    """The rows of `linear_qk_hw` that make keys: the last head of every key-value group, a view."""
    heads = config.num_attention_heads // config.num_query_groups + 1
    return weight.view(-1, heads, config.kv_channels, weight.shape[-1])[:, -1]


def gradients(model: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All gradients, and of those the ones of the post-LLM's projections of keys for rows and columns."""
    config = model.module.config
    post_llm = [layer for layer in model.module.decoder.layers if layer.layer_number > config.sizes.pre_buffer_layers]
    keys = [key_rows(layer.self_attention.linear_qk_hw.weight.main_grad, config) for layer in post_llm]
    return [parameter.main_grad for parameter in model.parameters() if parameter.requires_grad], keys


def norm(tensors: list[torch.Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def main() -> None:
    _, output, clipping, *flags = sys.argv
    sys.argv[1:] = flags
    reduce_gradients = pretraining._loss.finalize_model_grads
    with Path(output).open("w") as file:

        def finalize_model_grads(chunks: list[torch.nn.Module], *arguments, **groups) -> None:
            reduce_gradients(chunks, *arguments, **groups)
            whole, keys = gradients(chunks[0])
            record = {"total": norm(whole), "keys": norm(keys)}
            if clipping == "apart" and record["keys"] > 1:
                for gradient in keys:
                    gradient /= record["keys"]
            print(json.dumps({**record, "to_clip": norm(whole)}), file=file)

        pretraining._loss.finalize_model_grads = finalize_model_grads
        pretraining.train()


if __name__ == "__main__":
    main()
