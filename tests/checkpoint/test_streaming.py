"""Tensors between files and memory: any strides and types, in order, and little memory whatever the model's size."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.hf_directory import SafetensorsDirectory
from neo_megatron.checkpoint.names import hf_shapes
from neo_megatron.checkpoint.streaming import (
    BLOCK_BYTES,
    WRITE_BYTES,
    BlockWriter,
    StoredTensor,
    one_ahead,
    read_into,
    write_from,
)
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.presets import SIZES


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def as_file(tensor):
    return io.BytesIO(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


# A block holds 262,144 float32: below, at, and above it; rows wider than a block; one dimension and none.
SHAPES = [(3, 5), (512, 512), (513, 512), (2, BLOCK_BYTES // 4 + 1), (300_000,), ()]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_is_read_into_any_strides_and_types(shape, dtype):
    stored = random(*shape, dtype=dtype)
    for view in (torch.empty(shape), torch.empty((*shape, 2))[..., 0], torch.empty(shape, dtype=torch.bfloat16)):
        read_into(view, as_file(stored), dtype)
        assert torch.equal(view, stored.to(view.dtype))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_tensor_is_written_from_any_strides(shape):
    tensor = torch.stack([random(*shape), torch.zeros(shape)], dim=-1)[..., 0]
    file = io.BytesIO()
    write_from(tensor, file)
    assert file.getvalue() == as_file(tensor).getvalue()


def test_large_writes_come_in_pieces():
    lengths = []

    class File(io.BytesIO):
        def write(self, data):
            lengths.append(len(data))
            return super().write(data)

    data = bytes(range(256)) * 10_000
    file = File()
    assert BlockWriter(file).write(memoryview(data)) == len(data) and file.getvalue() == data
    assert len(lengths) == 20 and max(lengths) == WRITE_BYTES


def test_a_file_that_ends_early_is_an_error():
    with pytest.raises(ValueError, match="ends in the middle of a tensor"):
        read_into(torch.empty(10, 10), as_file(random(9, 10)), torch.float32)


@pytest.mark.parametrize("large, dtype", [(70_000.0, torch.float16), (3.4e38, torch.bfloat16)])
def test_rounding_is_accepted_and_overflow_refused(large, dtype):
    stored = torch.tensor([0.1, torch.inf, -torch.inf, torch.nan, 1.0])
    view = torch.empty(5, dtype=dtype)
    read_into(view, as_file(stored), torch.float32)
    assert torch.equal(view.nan_to_num(), stored.to(dtype).nan_to_num())
    stored[4] = large
    with pytest.raises(ValueError, match=f"exceeds what {dtype} can hold"):
        read_into(view, as_file(stored), torch.float32)


def test_exactly_one_tensor_is_prefetched():
    wanted = [StoredTensor(str(number), (number + 1, 3), torch.float32) for number in range(20)]
    filled = []

    def fill(stored, tensor):
        assert tensor.untyped_storage().nbytes() == stored.nbytes  # all that torch.save would write
        tensor.fill_(int(stored.name))
        filled.append(stored.name)

    for number, tensor in enumerate(one_ahead(wanted, fill, "test")):
        assert tensor.shape == (number + 1, 3) and (tensor == number).all()
        assert number + 1 <= len(filled) <= number + 2
    assert filled == [stored.name for stored in wanted]


def test_an_error_of_prefetching_is_raised_in_order():
    def fill(stored, tensor):
        if stored.name == "2":
            raise ValueError("no such tensor")

    tensors = one_ahead([StoredTensor(str(number), (2,), torch.float32) for number in range(4)], fill, "test")
    next(tensors), next(tensors)
    with pytest.raises(ValueError, match="no such tensor"):
        next(tensors)


def test_types_and_places_are_safetensors_own(tmp_path):
    tensors = {"a": random(3, 4), "b": random(7, dtype=torch.bfloat16), "c": random(2, dtype=torch.float16)}
    save_file({**tensors, "d": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors", metadata={"a": "b"})
    directory = SafetensorsDirectory(tmp_path)
    for name, tensor in tensors.items():
        assert directory.shapes[name] == tuple(tensor.shape) and directory.dtype(name) == tensor.dtype
        assert torch.equal(directory.read(name), tensor)
    with pytest.raises(ValueError, match="d is stored as I8"):
        directory.dtype("d")


def peak() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux: /proc/self/clear_refs")
def test_memory_is_two_tensors_whatever_the_model(golden, tokenizer, tmp_path):
    """24 layers of 7 MB; the largest tensor has 3 MB. Held or mapped all at once, they would show."""
    sizes = SIZES["tiny"].replace(
        **dict(hidden_size=512, ffn_hidden_size=768, num_attention_heads=4, head_dim=64, post_llm_layers=22),
        **dict(vocab_size=1024, image_start_token_id=897, image_context_token_id=896),
    )
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(sizes.to_hf()))
    tensors = {name: random(*shape) for name, shape in hf_shapes(sizes).items()}
    total, largest = sum(t.nbytes for t in tensors.values()), 2 * 768 * 512 * 4
    save_file(tensors, source / "model.safetensors")
    del tensors

    def convert(hf, megatron, back):
        convert_hf_to_megatron(hf, megatron)
        convert_megatron_to_hf(megatron, back, tokenizer)

    convert(golden / "ckpt_untied", tmp_path / "first-megatron", tmp_path / "first")  # imports, and what they keep
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = peak()
    convert(source, tmp_path / "megatron", tmp_path / "back")
    assert peak() - before < 2 * largest + 20e6 < total / 5
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > total
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == hf_shapes(sizes).keys()
