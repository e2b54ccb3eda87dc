"""NEO's patch embedding: patches of images -> one vector per image token (2x2 patches).

Shape suffixes: N patches, C image tokens, E patch-embedding width, H hidden, X values of a patch or an image token.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from .configuration_neo import NEOVisionConfig


def rotate_pairs(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotates the channel pairs (0, 1), (2, 3), ... of float32 `x [N, width]` by the position `[N]` of each row."""
    width = x.shape[-1]
    exponent = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
    angle = position[:, None].float() * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[:, 0::2], x[:, 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(1)


class NEOPatchConvolution(nn.Conv2d):
    """A convolution whose stride is its size, as the matrix product that it is: `[..., X]`, X channel-first."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class NEOPatchEmbeddings(nn.Module):
    """Patches -> one vector per image token."""

    def __init__(self, config: NEOVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.merge = round(1 / config.downsample_ratio)
        size, width = config.patch_size, config.hidden_size
        self.patch_embedding = NEOPatchConvolution(config.num_channels, width, kernel_size=size, stride=size)
        self.dense_embedding = NEOPatchConvolution(width, config.llm_hidden_size, self.merge, self.merge)

    def forward(self, pixel_values: Tensor, grid_hw: Tensor) -> Tensor:
        """`pixel_values [N, 768]`, row-major per image; `grid_hw [images, 2]` in patches. Returns `[C, H]`."""
        patches_NE = self.rotate(gelu(self.patch_embedding(pixel_values)), grid_hw)
        return self.merge_patches(patches_NE, grid_hw)

    def rotate(self, patches_NE: Tensor, grid_hw: Tensor) -> Tensor:
        """First half of the channels by the patch's column, second half by its row, in float32."""
        column = torch.cat([torch.arange(w, device=patches_NE.device).repeat(h) for h, w in grid_hw.tolist()])
        row = torch.cat([torch.arange(h, device=patches_NE.device).repeat_interleave(w) for h, w in grid_hw.tolist()])
        theta = self.config.rope_theta_vision
        by_column, by_row = patches_NE.float().chunk(2, dim=-1)
        rotated = torch.cat([rotate_pairs(by_column, column, theta), rotate_pairs(by_row, row, theta)], dim=-1)
        return rotated.to(patches_NE.dtype)

    def merge_patches(self, patches_NE: Tensor, grid_hw: Tensor) -> Tensor:
        merged, start, m, E = [], 0, self.merge, patches_NE.shape[-1]
        for h, w in grid_hw.tolist():
            image = patches_NE[start : start + h * w].view(h // m, m, w // m, m, E)
            merged.append(image.permute(0, 2, 4, 1, 3).reshape(-1, E * m * m))
            start += h * w
        return self.dense_embedding(torch.cat(merged))


class NEOVisionModel(nn.Module):
    """The patch embedding under the name that the published checkpoints give it."""

    def __init__(self, config: NEOVisionConfig) -> None:
        super().__init__()
        self.embeddings = NEOPatchEmbeddings(config)

    def forward(self, pixel_values: Tensor, grid_hw: Tensor) -> Tensor:
        return self.embeddings(pixel_values, grid_hw)
