"""Likelihood of given answers: the log-probabilities of their tokens after a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neo_megatron.errors import DataError
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.prompts import Prompt


@dataclass(frozen=True)
class Likelihood:
    """``log_probability`` is summed over the answer's ``tokens``, not counting the end of the turn.

    ``is_greedy`` says whether each of them is the most probable one at its place.
    """

    log_probability: float
    tokens: int
    is_greedy: bool


def answer_likelihoods(
    answerer: Answerer, prompts: Sequence[Prompt], questions: Sequence[int], answers: Sequence[str]
) -> list[Likelihood]:
    """The likelihood of each answer; every prompt runs through the model once, however many answers it has.

    Args:
        questions: for each answer, which of the prompts it answers.

    Raises:
        DataError: an answer is empty.
    """
    rows = [answerer.tokenizer(answer, add_special_tokens=False, split_special_tokens=True) for answer in answers]
    tokens_BA, valid_BA = _padded([row["input_ids"] for row in rows], answerer.model.device)
    inputs = answerer.inputs(prompts)
    order = torch.tensor(questions, device=answerer.model.device)
    with torch.inference_mode():
        prompt = answerer.model(**inputs, use_cache=True, logits_to_keep=1)
        prompt.past_key_values.batch_select_indices(order)
        after = answerer.model.prepare_inputs_for_generation(
            torch.cat([inputs["input_ids"][order], tokens_BA], dim=1),
            past_key_values=prompt.past_key_values,
            attention_mask=torch.cat([inputs["attention_mask"][order], valid_BA], dim=1),
            use_cache=True,
        )
        logits_BAV = torch.cat([prompt.logits[order], answerer.model(**after).logits[:, :-1]], dim=1).float()
    chosen = logits_BAV.gather(-1, tokens_BA[..., None])[..., 0] - logits_BAV.logsumexp(dim=-1)
    greedy = (logits_BAV.argmax(dim=-1) == tokens_BA) | ~valid_BA.bool()
    return [
        Likelihood(float(row), int(count), bool(every))
        for row, count, every in zip(
            (chosen * valid_BA).sum(dim=1), valid_BA.sum(dim=1), greedy.all(dim=1), strict=True
        )
    ]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and, 0 on padding, validity, `[B, A]` each, padded on the right."""
    if not all(rows):
        raise DataError("an answer is empty: the likelihood of nothing is not defined")
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    valid = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        valid[number, : len(row)] = 1
    return tokens.to(device), valid.to(device)
