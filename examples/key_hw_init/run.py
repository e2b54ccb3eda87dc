"""Runs pretrain_neo, and also writes the norms of its gradients before clipping to a file.

python examples/key_hw_init/run.py NORMS.jsonl {together,apart} FLAGS...

With `apart` the gradient of the keys is first clipped separately.
"""

import json
import sys
from pathlib import Path

import torch

from neo_megatron.run import pretraining


def key_rows(weight: torch.Tensor, config) -> torch.Tensor:
    """A view of the rows of `linear_qk_hw` for keys: the last head of every key-value group."""
    heads = config.num_attention_heads // config.num_query_groups + 1
    return weight.view(-1, heads, config.kv_channels, weight.shape[-1])[:, -1]


def gradients(model: torch.nn.Module) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All gradients, and those of the post-LLM's key projections for rows and columns."""
    config = model.module.config
    post_llm = [layer for layer in model.module.decoder.layers if layer.layer_number > config.sizes.pre_buffer_layers]
    keys = [key_rows(layer.self_attention.linear_qk_hw.weight.main_grad, config) for layer in post_llm]
    return [parameter.main_grad for parameter in model.parameters() if parameter.requires_grad], keys


def norm(tensors: list[torch.Tensor]) -> float:
    """The L2 norm of all values of the tensors."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def main() -> None:
    """Trains with a hook where Megatron has reduced the gradients."""
    _, output, clipping, *flags = sys.argv
    sys.argv[1:] = flags
    reduce_gradients = pretraining._loss.finalize_model_grads
    with Path(output).open("w") as file:

        def finalize_model_grads(chunks: list[torch.nn.Module], *arguments, **groups) -> None:
            reduce_gradients(chunks, *arguments, **groups)
            complete, keys = gradients(chunks[0])
            record = {"total": norm(complete), "keys": norm(keys)}
            if clipping == "apart" and record["keys"] > 1:
                for gradient in keys:
                    gradient /= record["keys"]
            print(json.dumps({**record, "to_clip": norm(complete)}), file=file)

        pretraining._loss.finalize_model_grads = finalize_model_grads
        pretraining.train()


if __name__ == "__main__":
    main()
