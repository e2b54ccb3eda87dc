"""The baseline: the exported model in plain PyTorch, with compiled FlexAttention, AdamW and a loop written by hand.

Weights and moments are bfloat16 and PyTorch's fused AdamW updates them: the fastest that a plain loop can be, faster
than weights in float32 under autocast. Ours keeps float32 weights, gradients and moments besides.
"""

from collections.abc import Callable
from typing import Any

from neo_megatron.benchmarks.gpu_packs import plain_inputs
from neo_megatron.benchmarks.gpu_window import Meter, Windows


def prepare() -> None:
    """Imports what `run` needs, before the GPU is used."""
    import torch  # noqa: F401

    from neo_megatron.hf import modeling_neo  # noqa: F401


def run(report: Callable[[dict[str, Any]], None], windows: Windows, checkpointing: bool) -> None:
    """Reports every window; `checkpointing` recomputes every layer, as transformers does it."""
    import torch

    from neo_megatron.hf.configuration_neo import NEOChatConfig
    from neo_megatron.hf.modeling_neo import NEOChatModel

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    config = NEOChatConfig(**windows.sizes.to_hf())
    # On a CPU FlexAttention takes minutes to compile, and has no backward.
    config._attn_implementation = "flex_attention" if on_gpu else "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        model = NEOChatModel(config).to(dtype).train()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def form(pack: dict[str, Any]) -> dict[str, Any]:
        inputs = plain_inputs(pack)
        # Everything but the patches is small; pixels in the dtype of the first product.
        return {key: value.to(dtype if key == "pixel_values" else value.dtype) for key, value in inputs.items()}

    meter = Meter(windows, report)
    for inputs in meter.batches(form):
        loss = model(**{key: value.to(device) for key, value in inputs.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        meter.losses.append(loss.detach())
