"""Runs pretrain_neo with an ablated mask and ablated positions, then answers the validation packs.

    python examples/ablations/run.py ANSWERS.json {mixed,causal} {native,t,sequence} FLAGS...

Without `--valid-data-path` nothing is answered. An answer is the model's if every one of its tokens is the most likely
one after the right tokens before it, which is what greedy generation would give.
"""

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from neo_megatron.data.dataset import PackDataset, collate
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.run import pretraining
from neo_megatron.run.start import stand_alone

PACKS_AT_ONCE = 16


def ablated(inputs: dict[str, Tensor], mask: str, positions: str) -> dict[str, Tensor]:
    """The arguments of `NeoModel.forward` with another mask and other positions.

    The patch embedding keeps its own positions: it is the same in every arm.
    """
    inputs = dict(inputs)
    if mask == "causal":
        inputs["image"] = torch.full_like(inputs["image"], -1)
    if positions != "native":
        thw = torch.zeros_like(inputs["positions_thw"])
        thw[..., 0] = inputs["positions_thw"][..., 0] if positions == "t" else sequence_positions(inputs["document"])
        inputs["positions_thw"] = thw
    return inputs


def sequence_positions(document_BT: Tensor) -> Tensor:
    """``[B, T]``: the number of each token in its document, from 0."""
    token = torch.arange(document_BT.shape[1]).expand_as(document_BT)
    starts = torch.ones_like(document_BT, dtype=torch.bool)
    starts[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    return token - torch.where(starts, token, 0).cummax(dim=1).values


@torch.no_grad()
def answer(model: torch.nn.Module, packs: Path, mask: str, positions: str) -> dict[str, object]:
    """The mean cross entropy of the answers' tokens, and for each record of the annotations whether it is right."""
    dataset = PackDataset(packs, None, seed=0, images="patches")
    experts, length = bool(model.config.sizes.num_experts), dataset.packs.sequence_length
    right, total, tokens = {}, 0.0, 0
    for first in range(0, len(dataset), PACKS_AT_ONCE):
        numbers = range(first, min(first + PACKS_AT_ONCE, len(dataset)))
        batch = collate([dataset[number] for number in numbers])
        inputs = ablated(model_inputs(batch, first_stage=True, last_stage=True, experts=experts), mask, positions)
        targets = inputs.pop("targets")
        logits = model(**inputs)
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        tokens += len(targets)
        documents = batch["document"].flatten()[batch["target_index"]]
        correct = logits.argmax(dim=-1) == targets
        for row, number in enumerate(numbers):
            in_pack = batch["target_index"] // length == row
            for place, (_, record) in enumerate(dataset.describe(number)):
                # The last token is the newline after the end of the turn, which is not generated.
                right[record] = bool(correct[in_pack & (documents == place)][:-1].all())
    return {"loss": total / tokens, "right": [right[record] for record in sorted(right)]}


def main() -> None:
    """Trains, and writes the answers."""
    _, output, mask, positions, *flags = sys.argv
    sys.argv[1:] = flags
    stand_alone(flags)
    built: list[torch.nn.Module] = []
    build = pretraining.model_provider

    def model_provider(*arguments, **settings):
        built.append(build(*arguments, **settings))
        return built[-1]

    pretraining.model_provider = model_provider
    pretraining.model_inputs = lambda *arguments, **settings: ablated(
        model_inputs(*arguments, **settings), mask, positions
    )
    pretraining.train()
    if "--valid-data-path" in flags:
        (model,) = built
        model.eval()
        packs = Path(flags[flags.index("--valid-data-path") + 1])
        Path(output).write_text(json.dumps(answer(model, packs, mask, positions)))


if __name__ == "__main__":
    main()
