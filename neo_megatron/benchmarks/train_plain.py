"""The plain side of the training benchmark: the exported model in transformers and a training loop written by hand."""

from multiprocessing.connection import Connection
from pathlib import Path

from neo_megatron.benchmarks.train_step import Clock, Step, grown, settings


def run(connection: Connection, inputs: Path, vocabulary: int, recompute: bool) -> None:
    """Trains one step per request on ``connection``, and answers with a `Step`."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = grown()
    model = AutoModelForCausalLM.from_pretrained(
        inputs / f"hf-{vocabulary}", trust_remote_code=True, dtype=torch.float32
    ).train()
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    # Made in advance, so that the plain loop's data cost nothing.
    batch = load_file(inputs / "plain.safetensors")
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings["lr"],
        weight_decay=settings["weight_decay"],
        betas=settings["betas"],
        eps=settings["eps"],
        fused=True,
    )
    clock = Clock()
    while connection.recv():
        clock.restart()
        loss = model(**batch, use_cache=False).loss
        value = loss.item()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"], foreach=True)
        optimizer.step()
        optimizer.zero_grad()
        clock.mark("optimizer")
        connection.send(Step(value, clock.parts, grown() - base))
