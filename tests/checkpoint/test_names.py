"""The one table: complete, invertible, and laid out so that a tensor-parallel rank gets complete heads."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import conv2d, linear

from neo_megatron.checkpoint.names import check_shapes, hf_shapes, tensor_table
from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.model.config import NeoSizes


@pytest.fixture(scope="module")
def sizes(golden) -> NeoSizes:
    return read_sizes(golden / "ckpt_untied")


def row_of(sizes, key):
    return next(row for row in tensor_table(sizes) if row.megatron == key)


def merged(row, parts):
    tensor = torch.empty(row.megatron_shape)
    for view, part in zip(row.views(tensor), parts, strict=True):
        view.copy_(part.view(view.shape))
    return tensor


def random_parts(row, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(part.shape, generator=draw) for part in row.hf.values()]


def test_names_are_the_published_ones(golden, sizes):
    published = load_file(golden / "ckpt_untied" / "model.safetensors")
    assert hf_shapes(sizes) == {name: tuple(tensor.shape) for name, tensor in published.items()}


def test_a_tied_head_has_no_row(sizes):
    tied = sizes.replace(tie_word_embeddings=True)
    assert "output_layer.weight" not in [row.megatron for row in tensor_table(tied)]
    assert hf_shapes(sizes).keys() - hf_shapes(tied).keys() == {"language_model.lm_head.weight"}


def test_every_row_splits_what_it_merged(sizes):
    for row in tensor_table(sizes):
        parts = random_parts(row)
        for before, after in zip(parts, row.split(merged(row, parts)), strict=True):
            assert torch.equal(before, after), row.megatron


def test_the_parts_of_a_row_cover_its_tensor(sizes):
    for row in tensor_table(sizes):
        counts = torch.zeros(row.megatron_shape)
        for view in row.views(counts):
            view += 1
        assert (counts == 1).all(), row.megatron


@pytest.mark.parametrize("kind, per_group", [("linear_qkv", (2, 1, 1)), ("linear_qk_hw", (2, 1))])
def test_heads_lie_group_by_group(sizes, kind, per_group):
    """Golden sizes: four query heads on two groups of keys; head h of a part is rows h*d to (h+1)*d."""
    row, d = row_of(sizes, f"decoder.layers.3.self_attention.{kind}.weight"), sizes.head_dim
    parts = random_parts(row)
    expected = [
        part[(group * heads + head) * d : (group * heads + head + 1) * d]
        for group in range(2)
        for part, heads in zip(parts, per_group, strict=True)
        for head in range(heads)
    ]
    assert torch.equal(merged(row, parts), torch.cat(expected))


def test_the_patch_embedding_is_two_matrix_products(sizes):
    draw = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 32, 32, generator=draw)  # one image token of 2x2 patches
    patch, merge = (row_of(sizes, f"patch_embedding.{kind}_projection.weight") for kind in ("patch", "merge"))
    (patch_kernel,), (merge_kernel,) = random_parts(patch), random_parts(merge)
    blocks = image.view(3, 2, 16, 2, 16).permute(1, 3, 0, 2, 4).reshape(4, 768)
    as_matrices = linear(linear(blocks, merged(patch, [patch_kernel])).flatten()[None], merged(merge, [merge_kernel]))
    as_convolutions = conv2d(conv2d(image, patch_kernel, stride=16), merge_kernel, stride=2)
    torch.testing.assert_close(as_matrices, as_convolutions.flatten(1), atol=1e-2, rtol=1e-5)


def test_tensor_parallel_dimensions_are_megatrons(sizes):
    dims = {row.megatron.removeprefix("decoder.layers.0."): row.tensor_parallel_dim for row in tensor_table(sizes)}
    split = {name: dim for name, dim in dims.items() if dim is not None and not name.startswith("decoder.")}
    assert split == {
        "embedding.word_embeddings.weight": 0,
        "self_attention.linear_qkv.weight": 0,
        "self_attention.linear_qk_hw.weight": 0,
        "self_attention.linear_proj.weight": 1,
        "mlp.linear_fc1.weight": 0,
        "mlp.linear_fc2.weight": 1,
        "output_layer.weight": 0,
    }


def test_errors_name_the_tensors():
    expected = {"a": (1,), "b": (2,), "c": (3,)}
    with pytest.raises(
        ValueError, match=r"^HERE lacks a; has the unexpected d; has b of shape \[9\] instead of \[2\]: "
    ):
        check_shapes({"b": (9,), "c": (3,), "d": (4,)}, expected, "HERE")
    check_shapes(dict(expected), expected, "HERE")
