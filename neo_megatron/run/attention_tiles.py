"""Times the tiles of FlexAttention that `flex_kernel.choices_to_time` lists, once for each kind of GPU, for all ranks.

Tiles change the order of sums, and so the last bits of losses. Therefore all ranks take those of rank 0, which alone
times, reads and writes; the log names them; and a file keeps them, so that later runs on such a GPU round alike. With
`--attention-tiles table`, and always with `--deterministic-mode`, nothing is timed or read.

The file is in `neo-megatron-tiles` of XDG_CACHE_HOME or ~/.cache, as PyTorch's hub is. (`neo-megatron` next to it is
kept below a size by removing files.)
"""

import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from megatron.core.transformer.enums import AttnBackend

from neo_megatron.atomic_files import write_atomically
from neo_megatron.checked_files import UnreadableFile, read_json
from neo_megatron.errors import DataError
from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.model import core_attention
from neo_megatron.model.block_mask import SeenKeys
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.flex_kernel import FLEX_BLOCK, Widths, choices_to_time, describe_options, one_direction
from neo_megatron.model.mask import AttentionRule
from neo_megatron.run.ranks import on_rank_0, rank_and_ranks

logger = logging.getLogger(__name__)

Options = dict[str, int]
# Seconds of forward and backward with these options.
Timer = Callable[[Options], tuple[float, float]]

LARGEST_FILE = 1 << 20
# Two documents with an image each: a query sees about a third of the keys, as in packs of the length mix. Which tiles
# are fastest is taken to depend neither on longer packs nor on how many heads a rank has.
TOKENS, DOCUMENT, IMAGE = 8192, 4096, range(512, 2560)
HEADS, GROUPS = 16, 8
WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class Kernel:
    """All that the choice depends on; times of another one say nothing.

    Args:
        query_key, value: channels of a head.
    """

    device: str
    capability: str
    query_key: int
    value: int
    dtype: str
    torch: str
    triton: str

    @property
    def file(self) -> Path:
        """Holds its tiles."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = re.sub(r"[^\w.]+", "-", "-".join(map(str, asdict(self).values())))
        return home / "neo-megatron-tiles" / f"{name}.json"


class AttentionTiles:
    """The tiles of a run. One per process: the model chunks of virtual pipeline stages share them."""

    def __init__(self, args: Namespace) -> None:
        self._args = args

    @cached_property
    def options(self) -> Options | None:
        """`kernel_options` of FlexAttention, or None for those of `flex_kernel`; collective at the first use."""
        args = self._args
        if cpu_platform.on_cpu() or args.attention_backend != AttnBackend.auto:
            return None
        widths = NeoSizes(**args.neo_sizes).attention_widths
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        kernel = Kernel(
            device=properties.name,
            capability=f"{properties.major}.{properties.minor}",
            query_key=widths[0],
            value=widths[1],
            dtype=str(args.params_dtype).removeprefix("torch."),
            torch=torch.__version__,
            triton=triton.__version__,
        )
        choices = choices_to_time(
            Widths(*widths, args.params_dtype.itemsize),
            (properties.major, properties.minor),
            properties.shared_memory_per_block_optin,
        )
        fixed = "--deterministic-mode" if args.deterministic_mode else "--attention-tiles table"
        if args.deterministic_mode or args.attention_tiles == "table" or len(choices) < 2:
            if choices and rank_and_ranks()[0] == 0:
                _say(f"{describe_options(choices[0])}; not timed: {fixed if len(choices) > 1 else 'the only choice'}")
            return None
        timed_on, options = on_rank_0(lambda: (kernel, choose(kernel, choices, GpuTimer(widths, args.params_dtype))))
        if timed_on != kernel:
            logger.warning(
                "attention tiles: rank 0 timed them for %s, this rank has %s and takes those of the table",
                *(timed_on, kernel),
            )
            return None
        return options


def choose(kernel: Kernel, choices: list[Options], seconds: Timer) -> Options:
    """The kept tiles, or else the fastest of each direction, which are kept from then on.

    Args:
        choices: the first must run; others may fail to compile.
    """
    if (kept := _kept(kernel, choices)) is not None:
        _say(f"{describe_options(kept)}; timed before, kept in {kernel.file}")
        return kept
    times = []
    for number, options in enumerate(choices, 1):
        _say(f"timing choice {number} of {len(choices)}, {describe_options(options)}; it compiles for up to a minute")
        try:
            times.append((options, *seconds(options)))
        except Exception as error:  # compilers raise any exception
            if number == 1:
                raise
            _say(f"choice {number} does not run: {(str(error).splitlines() or [type(error).__name__])[0][:150]}")
            continue
        _say(f"choice {number}: forward {1000 * times[-1][1]:.3f} ms, backward {1000 * times[-1][2]:.3f} ms")
    forward, _, _ = min(times, key=lambda row: row[1])
    backward, _, _ = min(times, key=lambda row: row[2])
    fastest = one_direction(forward, "fwd") | one_direction(backward, "bwd")
    # Another run may have timed meanwhile; the first one's tiles are everyone's.
    if (kept := _kept(kernel, choices)) is not None:
        _say(f"{describe_options(kept)}; another run has timed them meanwhile, kept in {kernel.file}")
        return kept
    content = {"kernel": asdict(kernel), "choices": choices, "options": fastest, "times": times}
    try:
        kernel.file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(kernel.file, (json.dumps(content, indent=1) + "\n").encode())
        _say(f"{describe_options(fastest)}; timed, kept in {kernel.file}")
    except (OSError, DataError) as error:
        _say(f"{describe_options(fastest)}; timed for this run only, because {error}")
    return fastest


def _kept(kernel: Kernel, choices: list[Options]) -> Options | None:
    if not os.path.lexists(kernel.file):
        return None
    try:
        content = read_json(kernel.file, LARGEST_FILE)
    except UnreadableFile as error:
        _say(f"timing again, because {error}")
        return None
    options: Any = content.get("options")
    known = content.get("kernel") == asdict(kernel) and content.get("choices") == choices
    for prefix in ("fwd", "bwd"):
        known &= isinstance(options, dict) and one_direction(options, prefix) in [
            one_direction(choice, prefix) for choice in choices
        ]
    if not known or len(options) != len(choices[0]):
        _say(f"timing again, because {kernel.file} is of other choices of tiles")
        return None
    return options


class GpuTimer:
    """A `Timer` on this process's GPU. Draws from no random state that others use.

    Args:
        widths: channels of a query or key head, and of a value head.
        dtype: of all of them.
    """

    def __init__(self, widths: tuple[int, int], dtype: torch.dtype) -> None:
        query_key, value = widths
        draw = torch.Generator("cuda").manual_seed(0)
        self._tensors = [
            torch.randn(TOKENS, 1, heads, width, generator=draw, device="cuda", dtype=dtype).requires_grad_()
            for heads, width in ((HEADS, query_key), (GROUPS, query_key), (GROUPS, value))
        ]
        self._gradient = torch.ones(TOKENS, 1, HEADS * value, device="cuda", dtype=dtype)
        document = torch.arange(TOKENS, device="cuda", dtype=torch.int32)[None] // DOCUMENT
        place = torch.arange(TOKENS, device="cuda")[None] % DOCUMENT
        image = torch.where((place >= IMAGE.start) & (place < IMAGE.stop), document, -1)
        self._seen = SeenKeys.of(AttentionRule(document, image))
        self._scale = value**-0.5

    def __call__(self, options: Options) -> tuple[float, float]:
        """Medians of the forward and of the backward."""
        mask, times = self._mask(options), []
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        try:
            for _ in range(WARM_UP + REPEATS):
                start.record()
                out = self._forward(mask)
                middle.record()
                self._backward(out)
                end.record()
                end.synchronize()
                times.append((start.elapsed_time(middle) / 1000, middle.elapsed_time(end) / 1000))
        finally:
            torch._dynamo.reset()  # graphs of one choice are not those of the run
        forward, backward = zip(*times[WARM_UP:], strict=True)
        return median(forward), median(backward)

    def results(self, options: Options) -> tuple[torch.Tensor, ...]:
        """The output, and the gradients of query, key and value."""
        out = self._forward(self._mask(options))
        return out, *self._backward(out)

    def _mask(self, options: Options) -> core_attention.FlexMask:
        return core_attention.FlexMask(self._seen, self._seen.blocks(TOKENS, FLEX_BLOCK), options)

    def _forward(self, mask: core_attention.FlexMask) -> torch.Tensor:
        query, key, value = self._tensors
        return core_attention.attend(query, key, value, mask, self._scale)

    def _backward(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(out, self._tensors, self._gradient)


def _say(text: str) -> None:
    print(f"attention tiles: {text}", flush=True)
