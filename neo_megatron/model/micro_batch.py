"""Collated packs -> the inputs of this rank's part of the model.

Runs on the CPU, before anything is copied to the device, so that selecting a rank's share never waits for the device;
`to_device` then copies asynchronously.

Shape suffixes: B packs of a micro-batch, T tokens of a pack, S of them held by this context-parallel rank, C image
tokens, M trained positions.
"""

import torch
from torch import Tensor, arange, full

from neo_megatron.model.cp_token_split import contiguous_rows, even_rows


def context_share(packs: dict[str, Tensor], rank: int, ranks: int, gather_keys: bool) -> dict[str, Tensor]:
    """This context-parallel rank's tokens of every pack, in the form of collated packs of S tokens.

    ``document`` and ``image`` stay those of complete packs: the keys' side of the mask. ``modality`` is added, see
    `expert_router.Tokens`.

    Args:
        packs: as `neo_megatron.data.dataset.collate` returns them.
        gather_keys: rows are dealt by work, and ``query_rows`` int64 [S] (the rank's rows) and ``key_order`` int64 [T]
            (where each token stands among the gathered ones) are added; otherwise the rank's tokens are contiguous.
    """
    length = packs["tokens"].shape[1]
    document, image = packs["document"], packs["image"]
    all_rows = even_rows(document, image, ranks) if gather_keys else contiguous_rows(length, ranks)
    rows = all_rows[rank]
    place = full((length,), -1)
    place[rows] = arange(len(rows))
    share = {**packs, "tokens": packs["tokens"][:, rows], "positions_thw": packs["positions_thw"][:, rows]}
    share["modality"] = modality_of(packs)[:, rows]
    of_target = tuple(name for name in ("targets", "target_weight", "target_group") if name in packs)
    indices: dict[str, tuple[str, ...]] = {"image_token_index": ("patches",), "target_index": of_target}
    if gather_keys and "measured_index" in packs:  # otherwise attention sees the rows of complete packs
        indices["measured_index"] = ()
    for index, belonging in indices.items():
        local = place[packs[index] % length]
        here = local >= 0
        share[index] = (packs[index] // length * len(rows) + local)[here]
        share |= {name: packs[name][here] for name in belonging}
    if gather_keys:
        share |= {"query_rows": rows, "key_order": all_rows.flatten().argsort()}
    return share


def modality_of(packs: dict[str, Tensor]) -> Tensor:
    """int8 ``[B, T]``: 1 for image tokens, -1 for padding, else 0."""
    return (packs["image"] >= 0).to(torch.int8).masked_fill(packs["document"] < 0, -1)


def model_inputs(
    packs: dict[str, Tensor],
    first_stage: bool,
    last_stage: bool,
    sequence_rank: int = 0,
    sequence_ranks: int = 1,
    experts: bool = False,
) -> dict[str, Tensor]:
    """The arguments of `NeoModel.forward` on one rank.

    Collated packs number their tokens pack by pack (``pack * T + token``); hidden states are ``[T, B, H]``, so that the
    same token is row ``token * B + pack`` there.

    Args:
        packs: as `neo_megatron.data.dataset.collate` or `context_share` returns them.
        first_stage, last_stage: words and images go to the first pipeline stage only, targets to the last only.
        sequence_rank, sequence_ranks: under sequence parallelism, which part of every pack this rank embeds; it gets
            the image tokens of that part only.
        experts: the model is a mixture of experts.
    """
    count, length = packs["tokens"].shape
    inputs = {name: packs[name] for name in ("positions_thw", "document", "image")}
    inputs |= {name: packs[name] for name in ("query_rows", "key_order") if name in packs}
    if experts:
        modality = packs["modality"] if "modality" in packs else modality_of(packs)
        inputs["modality"] = modality.t().chunk(sequence_ranks)[sequence_rank].flatten()
    if len(packs.get("measured_index", ())):
        rows = packs["tokens" if "query_rows" in packs else "document"].shape[1]
        inputs["measured_rows"] = packs["measured_index"] % rows * count + packs["measured_index"] // rows
    if first_stage:
        inputs["tokens"] = packs["tokens"]
        pack, token = packs["image_token_index"] // length, packs["image_token_index"] % length
        part = length // sequence_ranks
        here = token // part == sequence_rank
        inputs["image_token_index"] = ((token - sequence_rank * part) * count + pack)[here]
        inputs["image_token_position"] = packs["positions_thw"].flatten(0, 1)[packs["image_token_index"][here], 1:]
        inputs["patches"] = packs["patches"][here] if sequence_ranks > 1 else packs["patches"]
    if last_stage:
        pack, token = packs["target_index"] // length, packs["target_index"] % length
        inputs["target_index"] = token * count + pack
        inputs["targets"] = packs["targets"]
    return inputs


def to_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies tensors to the device asynchronously.

    Copies from pageable memory block, whatever `non_blocking` says. The loader pins collated tensors; a share of them
    is new memory and is pinned here, where torch reuses pinned memory.
    """

    def pinned(tensor: Tensor) -> Tensor:
        return tensor if device.type == "cpu" or tensor.is_pinned() else tensor.pin_memory()

    return {name: pinned(tensor).to(device, non_blocking=True) for name, tensor in tensors.items()}
