"""Patches -> one vector per image token (2x2 patches), as two matrix products over patches stored in 2x2-block order.

The published model writes the same as two strided convolutions over padded canvases. Every patch is its own window of
the first and every image token its own window of the second, so both are plain matrix products: no padding to the
largest image, no loop over images, no host synchronisation.

Shape suffixes: C image tokens of this rank, E channels of the patch embedding, H hidden size.
"""

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.functional import gelu

from neo_megatron.data.image import IMAGE_MEAN, IMAGE_STD
from neo_megatron.model.native_rope import inverse_frequencies
from neo_megatron.model.transformer_config import NeoConfig


def normalise(patches_C4V: Tensor) -> Tensor:
    """uint8 ``[C, 4, 768]`` (channel-first) -> float32 ``[C, 4, 768]``, scaled to [0, 1] and standardised."""
    pixels_C4V = patches_C4V.to(torch.float32, copy=True)
    channels = pixels_C4V.unflatten(-1, (3, -1)).unbind(-2)
    # In place: new memory for every step of the arithmetic takes a CPU longer than the arithmetic. By numbers, not
    # tensors: on a GPU a tensor of them would be a copy that the host waits for.
    for channel, mean, std in zip(channels, IMAGE_MEAN, IMAGE_STD, strict=True):
        channel.mul_(1 / (255 * std)).sub_(mean / std)
    return pixels_C4V


def rotate_patches(x_C4E: Tensor, row_C: Tensor, column_C: Tensor, theta: float) -> Tensor:
    """2-D rotary embedding over the absolute patch position, in float32.

    The first half of the channels turns with the patch column, the second half with the patch row; channels 2i and
    2i+1 form a pair (NEO's published patch embedding).

    Args:
        x_C4E: ``[C, 4, E]``, patches of an image token in the order top left, top right, bottom left, bottom right.
        row_C, column_C: integers ``[C]``, position of the image token in the merged grid of its image.
    """
    half = x_C4E.shape[-1] // 2
    frequency = inverse_frequencies(half, theta, x_C4E.device)
    inside = torch.arange(4, device=x_C4E.device)
    column_C4 = 2 * column_C[:, None] + inside % 2
    row_C4 = 2 * row_C[:, None] + inside // 2
    angle = torch.stack((column_C4, row_C4), dim=-1)[..., None].float() * frequency  # [C, 4, 2, half/2]
    cos, sin = angle.cos(), angle.sin()
    even, odd = x_C4E.float().view(*x_C4E.shape[:2], 2, half // 2, 2).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).view_as(x_C4E)


class PatchEmbedding(MegatronModule):
    """Linear(768 -> E), exact GELU, 2-D rotary, Linear(4E -> H). Replicated over tensor-parallel ranks.

    Under sequence parallelism each rank embeds only the image tokens of its own part of the sequence; the gradients are
    then partial and summed over the tensor-parallel group, which the attribute `sequence_parallel` makes Megatron do.
    """

    def __init__(self, config: NeoConfig) -> None:
        super().__init__(config=config)
        sizes = config.sizes
        width = sizes.patch_embedding_size
        # torch.nn.Linear draws from the same distribution as the convolution it stands for: same fan-in, same bound.
        self.patch_projection = torch.nn.Linear(3 * sizes.patch_size**2, width, dtype=config.params_dtype)
        self.merge_projection = torch.nn.Linear(
            sizes.merge_size**2 * width, sizes.hidden_size, dtype=config.params_dtype
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, patches_C4V: Tensor, row_C: Tensor, column_C: Tensor) -> Tensor:
        """uint8 patches ``[C, 4, 768]`` and image-token positions ``[C]`` -> ``[C, H]``; C may be 0."""
        dtype = self.patch_projection.weight.dtype
        x_C4E = gelu(self.patch_projection(normalise(patches_C4V).to(dtype)))
        x_C4E = rotate_patches(x_C4E, row_C, column_C, self.config.sizes.rope_theta_patch).to(dtype)
        return self.merge_projection(x_C4E.flatten(1))
