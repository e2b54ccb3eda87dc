"""The loss of the exported model, and which labels count in it."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from .configuration_neo import NEOChatConfig


def trained_labels(
    labels: Tensor, image_BL: Tensor, config: NEOChatConfig, num_items: Tensor | int | None
) -> tuple[Tensor, Tensor | int | None]:
    """Labels `[B, L]` without those of `<img>`, `<IMG_CONTEXT>` and `</img>`, and the number of labels to divide by.

    Trainers copy input_ids into labels and leave it to the model to ignore image tokens, but count them. Their number
    is reduced in the proportion of this call: exact for one micro-batch, and where no label is an image token.
    """
    image_BL = image_BL.to(labels.device)
    end = torch.zeros_like(labels, dtype=torch.bool)
    end[:, 1:] = (image_BL[:, :-1] >= 0) & (image_BL[:, 1:] < 0)
    ignored = (labels == config.img_start_token_id) | (labels == config.img_context_token_id) | end
    text = labels.masked_fill(ignored, -100)
    if num_items is not None:
        before, after = ((it[:, 1:] != -100).sum() for it in (labels, text))
        num_items = num_items * (after.clamp_min(1) / before.clamp_min(1))
    return text, num_items


def weighted_loss(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, num_items: Tensor | int | None = None
) -> Tensor:
    """Cross entropy of token i+1 from position i in float32: the weighted mean, or the sum over ``num_items``."""
    targets = labels[:, 1:].reshape(-1).to(logits.device)
    token_loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="none")
    weights = (targets != -100).float()
    if weight is not None:
        weights = weights * weight[:, 1:].reshape(-1).to(logits.device)
    return (token_loss * weights).sum() / (weights.sum() if num_items is None else num_items)
