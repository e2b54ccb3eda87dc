"""Our side of the training benchmark: `pretraining.train()`, one step at a time.

Nothing of Megatron is replaced. The data iterator, the model and the functions that pretrain_neo hands to it tell where
in a step it is; a step lasts from one call of the iterator to the next, with all that Megatron does in between.
"""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from neo_megatron.benchmarks.train_step import BY_DATA_SET, SEED, Clock, Step, StopTraining, grown, settings


def run(connection: Connection, inputs: Path, vocabulary: int, recompute: bool, training_stage: int = 2) -> None:
    """Trains one step per request on ``connection``, and answers with a `Step`."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    # Importing it prepares torch and Megatron, so it comes before them.
    from neo_megatron.run import pretraining

    sys.argv = ["pretrain_neo", *arguments(inputs, vocabulary, recompute, training_stage)]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    clock, losses = Clock(), []
    base = grown()

    def datasets_provider(*given, **named):
        train, *others = original["datasets_provider"](*given, **named)
        return iterate(train), *others

    def iterate(packs: Iterator) -> Iterator:
        for number in range(sys.maxsize):
            clock.mark("Megatron's loop")
            if number:
                connection.send(Step(losses[-1], clock.parts, grown() - base))
            if not connection.recv():
                raise StopTraining
            clock.restart()
            pack = next(packs)
            clock.mark("data")
            yield pack

    def model_provider(*given, **named):
        model = original["model_provider"](*given, **named)
        model.register_forward_pre_hook(lambda *_: clock.mark("data"))
        finalize = model.config.finalize_model_grads_func

        def finalize_model_grads(*given, **named):
            clock.mark("backward")
            finalize(*given, **named)
            clock.mark("Megatron's loop")

        model.config.finalize_model_grads_func = finalize_model_grads
        return model

    def note_loss(*given):
        clock.mark("forward")
        original_note(*given)
        clock.mark(BY_DATA_SET)

    def forward_step(*given):
        output, loss_function = original["forward_step"](*given)

        def reduce(*given):
            loss, count, report = loss_function(*given)
            total, weight = report["lm loss"].tolist()
            losses.append(total / weight)
            clock.mark("forward")
            return loss, count, report

        return output, reduce

    datasets_provider.is_distributed = True
    original, original_note = dict(vars(pretraining)), pretraining._log.note_loss
    pretraining._log.note_loss = note_loss
    vars(pretraining).update(
        datasets_provider=datasets_provider, model_provider=model_provider, forward_step=forward_step
    )
    register_optimizer_step_post_hook(lambda *_: clock.mark("optimizer"))
    with suppress(StopTraining):
        pretraining.train()


def arguments(inputs: Path, vocabulary: int, recompute: bool, training_stage: int) -> list[str]:
    """The command line of pretrain_neo."""
    chosen: dict[str, Any] = {
        "--neo-model": inputs / f"hf-{vocabulary}",
        "--pretrained-checkpoint": inputs / f"megatron-{vocabulary}",
        "--train-data-path": inputs / "packs",
        "--training-stage": training_stage,
        "--seed": SEED,
        "--micro-batch-size": 1,
        "--global-batch-size": 1,
        "--train-iters": 1000,
        "--num-workers": 0,
        "--lr": settings["lr"],
        "--lr-decay-style": "constant",
        "--lr-warmup-iters": 0,
        "--weight-decay": settings["weight_decay"],
        "--adam-beta1": settings["betas"][0],
        "--adam-beta2": settings["betas"][1],
        "--adam-eps": settings["eps"],
        "--clip-grad": settings["clip"],
    }
    if recompute:
        chosen |= {"--recompute-granularity": "full", "--recompute-method": "uniform", "--recompute-num-layers": 1}
    return [str(part) for flag in chosen.items() for part in flag]
