"""Collated packs -> the inputs of this rank's part of the model.

Runs on the CPU, before anything is copied to the device, so that picking a rank's share never waits for the device.

Shape suffixes: B packs of a micro-batch, T tokens of a pack, C image tokens, M trained positions.
"""

from torch import Tensor


def model_inputs(
    packs: dict[str, Tensor], first_stage: bool, last_stage: bool, sequence_rank: int = 0, sequence_ranks: int = 1
) -> dict[str, Tensor]:
    """What `NeoModel.forward` takes on one rank.

    Collated packs number their tokens pack by pack (``pack * T + token``); hidden states are ``[T, B, H]``, so that the
    same token is row ``token * B + pack`` there.

    Args:
        packs: what `neo_megatron.data.dataset.collate` gives.
        first_stage, last_stage: pictures go to the first pipeline stage only, targets to the last only.
        sequence_rank, sequence_ranks: under sequence parallelism, which part of every pack this rank embeds; it gets
            the pictures' cells of that part only.
    """
    count, length = packs["tokens"].shape
    inputs = {name: packs[name] for name in ("tokens", "positions_thw", "document", "image")}
    if first_stage:
        pack, token = packs["cell_index"] // length, packs["cell_index"] % length
        part = length // sequence_ranks
        here = token // part == sequence_rank
        inputs["cell_index"] = ((token - sequence_rank * part) * count + pack)[here]
        inputs["cell_position"] = packs["positions_thw"].flatten(0, 1)[packs["cell_index"][here], 1:]
        inputs["patches"] = packs["patches"][here] if sequence_ranks > 1 else packs["patches"]
    if last_stage:
        pack, token = packs["target_index"] // length, packs["target_index"] % length
        inputs["target_index"] = token * count + pack
        inputs["targets"] = packs["targets"]
    return inputs
