"""Which kernel a GPU gets: block sizes within its shared memory, SDPA where there are none. No GPU is needed to ask."""

import math
from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnBackend
from support.random_packs import random_packs
from torch.nn.attention.flex_attention import flex_attention

from neo_megatron.errors import ConfigError
from neo_megatron.model import core_attention
from neo_megatron.model.attention_forms import FORMS
from neo_megatron.model.core_attention import FlexMask, attend, attention_pairs, build_mask, check_backend
from neo_megatron.model.flex_kernel import (
    KIB,
    Backward,
    Forward,
    Widths,
    all_that_fit,
    choices_to_time,
    describe_options,
    kernel_options,
    one_direction,
)

NEO = Widths(query_key=256, value=128)
# Shared memory that a block of threads may have, KiB (CUDA C++ Programming Guide, table of compute capabilities).
DEVICES = {(8, 0): 163, (8, 6): 99, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("number_bytes", [2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_device_gets_tiles_that_it_holds(capability, number_bytes, form):
    widths, limit = Widths(FORMS[form].query_key_widths * 128, 128, number_bytes), DEVICES[capability] * KIB
    check_tiles(kernel_options(widths, capability, limit), widths, capability, limit)


def check_tiles(options: dict[str, int], widths: Widths, capability: tuple[int, int], limit: int) -> None:
    forward = Forward(*(options[f"fwd_{name}"] for name in ("BLOCK_M", "BLOCK_N", "num_stages", "num_warps")))
    sizes = ("BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2", "num_stages", "num_warps")
    backward = Backward(*(options[f"bwd_{name}"] for name in sizes))
    assert forward.shared_memory(widths) <= limit and backward.shared_memory(widths) <= limit
    # Requirements of PyTorch's kernel: its blocks divide those of the mask, and its two loops fit into one another.
    assert not any(128 % size for name, size in options.items() if "BLOCK" in name)
    assert not options["bwd_BLOCK_N1"] % options["bwd_BLOCK_M1"]
    assert not options["bwd_BLOCK_M2"] % options["bwd_BLOCK_N2"]


def test_memory_of_known_tiles():
    """Counted by hand in rows of 256 + 128 numbers of 2 bytes, 768 bytes."""
    # 64 queries of 512 bytes; 3 x 32 keys and values; 64 x 32 weights.
    assert Forward(64, 32, 3, 4).shared_memory(NEO) == 64 * 512 + 3 * 32 * 768 + 64 * 32 * 2
    # 128 queries and gradients stay, 2 x 32 keys and values move; weights and their gradients.
    assert Backward(32, 64, 128, 32, 2, 8).shared_memory(NEO) == (128 + 2 * 32) * 768 + 2 * 128 * 32 * 2
    assert Backward(32, 128, 64, 32, 2, 8).shared_memory(NEO) == Backward(32, 64, 128, 32, 2, 8).shared_memory(NEO)
    assert Forward(64, 32, 3, 4).shared_memory(Widths(96, 48)) == Forward(64, 32, 3, 4).shared_memory(Widths(128, 64))


def test_float32_gets_tiles_that_compile_in_seconds():
    """Larger ones are unrolled into products without tensor cores, for minutes."""
    for capability, memory in DEVICES.items():
        options = kernel_options(Widths(256, 128, 4), capability, memory * KIB)
        assert {size for name, size in options.items() if name.startswith("bwd_BLOCK")} == {16}
        assert max(options["fwd_BLOCK_M"], options["fwd_BLOCK_N"]) <= 32


@pytest.mark.parametrize("widths", [(256, 128), (128, 128), (32, 16)])
@pytest.mark.parametrize("capability", DEVICES)
def test_a_few_choices_are_worth_timing(capability, widths):
    """The first is the table's; others fit, differ from it in both directions, and are what PyTorch's kernel asks."""
    for number_bytes in (2, 4):
        given = Widths(*widths, number_bytes), capability, DEVICES[capability] * KIB
        first, *others = choices_to_time(*given)
        assert first == kernel_options(*given) and len(others) <= 2
        if number_bytes == 4 or widths[0] == 32:  # nothing is known of those
            assert not others
        for options in others:
            check_tiles(options, *given)
            assert list(options) == list(first)
            for prefix in ("fwd", "bwd"):
                assert one_direction(options, prefix) != one_direction(first, prefix)
    assert not choices_to_time(NEO, capability, 8 * KIB)


def test_a_sweep_stays_within_the_device():
    forward, backward = all_that_fit(NEO, 227 * KIB)
    assert len(forward) > 20 and len(backward) > 20
    assert all(choice.shared_memory(NEO) <= 227 * KIB for choice in forward + backward)


@pytest.fixture
def gpu(monkeypatch):
    """Pretends a GPU with as much shared memory as a test says."""

    def pretend(memory: int, major: int = 8, minor: int = 9) -> None:
        properties = SimpleNamespace(name="A small GPU", major=major, minor=minor, shared_memory_per_block_optin=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        forget()

    def forget() -> None:
        core_attention._options_of.cache_clear()
        core_attention._flash_block.cache_clear()

    yield pretend
    forget()


def test_too_little_memory_ends_in_sdpa_and_one_sentence(gpu, caplog):
    gpu(8 * KIB)
    rule = random_packs(64, 1)
    for _ in range(2):
        mask = build_mask(rule, torch.bfloat16)
    assert torch.equal(mask[:, 0], rule.dense())
    (record,) = caplog.records
    assert "A small GPU has 8 KiB of shared memory" in record.getMessage() and "SDPA" in record.getMessage()


def test_enough_memory_is_flex_attention(gpu):
    gpu(99 * KIB)
    mask = build_mask(random_packs(64, 1), torch.bfloat16)
    assert isinstance(mask, FlexMask) and mask.options["fwd_BLOCK_M"] == 64 and not mask.repeated
    assert torch.is_tensor(build_mask(random_packs(64, 1), torch.bfloat16, backend=AttnBackend.unfused))


def test_timed_tiles_take_the_place_of_the_table(gpu):
    gpu(227 * KIB, 9, 0)
    _, timed, _ = choices_to_time(NEO, (9, 0), 227 * KIB)
    for backend, expected in (("auto", timed), ("flash", {"BACKEND": "FLASH"})):
        mask = build_mask(random_packs(256, 1), torch.bfloat16, backend=AttnBackend[backend], kernel_options=timed)
        assert mask.options == expected
    assert describe_options(timed) == "forward 128, 64; 3, 8 and backward 32, 64, 128, 32; 2, 8"


def test_kernels_that_neo_cannot_use_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="--attention-backend fused: none of its kernels"):
        check_backend(AttnBackend.fused)
    monkeypatch.setattr(core_attention, "_flash_attention_4", lambda: False)
    with pytest.raises(ConfigError, match="pip install 'flash-attn-4'"):
        check_backend(AttnBackend.flash)
    monkeypatch.setattr(core_attention, "_flash_attention_4", lambda: True)
    check_backend(AttnBackend.flash)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    check_backend(AttnBackend.auto)
    with pytest.raises(ConfigError, match="--deterministic-mode: FlashAttention 4"):
        check_backend(AttnBackend.flash)


@pytest.mark.parametrize(
    ("capability", "widths", "block"),
    [((9, 0), (256, 128), 64), ((9, 0), (128, 128), 128), ((9, 0), (192, 128), None), ((10, 0), (256, 128), None)],
)
def test_blocks_of_flash_attention_4(capability, widths, block, gpu):
    """Its backward shares key heads between query heads where keys and values are equally wide, else not."""
    gpu(227 * KIB, *capability)
    if block is None:
        with pytest.raises(ConfigError, match=f"heads of {widths[0]} and 128 on A small GPU .*choose"):
            build_mask(random_packs(256, 1), torch.bfloat16, widths, AttnBackend.flash)
        return
    mask = build_mask(random_packs(256, 1), torch.bfloat16, widths, AttnBackend.flash)
    assert (128, block) == mask.blocks.BLOCK_SIZE and mask.repeated == (widths[0] != widths[1])


@pytest.mark.parametrize("kernel", ["auto", "flash", "unfused"])
def test_every_kernel_gives_what_the_tiles_give(kernel, gpu, monkeypatch):
    """Values, on a CPU: FlexAttention uncompiled; key heads are shared by query heads, or repeated for them."""
    rule = random_packs(128, 2)
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(128, 2, 4, 32, generator=draw)
    key, value = (torch.randn(128, 2, 2, width, generator=draw) for width in (32, 16))
    expected = attend(query, key, value, build_mask(rule, torch.float32), scale=0.25)
    seen = []

    def plain(query, key, value, kernel_options, enable_gqa, **given):
        seen.append((key.shape[1], kernel_options.get("BACKEND", "AUTO")))
        return flex_attention(query, key, value, enable_gqa=enable_gqa, **given)

    gpu(227 * KIB, 9, 0)
    mask = build_mask(rule, torch.float32, widths=(32, 16), backend=AttnBackend[kernel])
    monkeypatch.undo()
    monkeypatch.setattr(core_attention, "_compiled_flex_attention", lambda: plain)
    torch.testing.assert_close(attend(query, key, value, mask, scale=0.25), expected, atol=2e-6, rtol=0)
    assert seen == {"auto": [(2, "AUTO")], "flash": [(4, "FLASH")], "unfused": []}[kernel]


@pytest.mark.parametrize(("kernel", "block"), [("auto", (128, 128)), ("flash", (128, 128)), ("unfused", (512, 512))])
def test_pairs_of_every_kernel_are_counted(kernel, block, gpu):
    """Computed are those of all blocks in which the dense mask allows a pair; without blocks, all."""
    gpu(227 * KIB, 9, 0)
    rule = random_packs(512, 2)
    dense = rule.dense()
    blocks = dense.unflatten(2, (-1, block[1])).unflatten(1, (-1, block[0])).any(dim=4).any(dim=2)
    mask = build_mask(rule, torch.float32, widths=(32, 16), backend=AttnBackend[kernel])
    assert attention_pairs(mask).tolist() == [blocks.sum() * math.prod(block), dense.sum()]
    assert blocks.all() == (kernel == "unfused")
