"""FlexAttention's kernels as Inductor writes them for a GPU: what their machine code takes, and their numbers.

Neither needs a GPU: Triton's wheel brings the assembler, and Triton's interpreter runs the kernels on a CPU.
tests/gpu/test_attention.py has the same numbers on a GPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from support.paths import ROOT

from neo_megatron.benchmarks import kernels as kernels_table
from neo_megatron.benchmarks.kernel_binaries import DEVICES, Binary
from neo_megatron.benchmarks.kernel_cases import AttentionCase, AttentionKernels, attention_case, compiled
from neo_megatron.benchmarks.kernels import ACCEPTED_SPILLS, CASES
from neo_megatron.model.flex_kernel import Widths, choices_to_time

# Relative errors of the output and of gradients: rounding of the result, and of weights and their gradients.
BOUNDS = {"float32": (1e-5, 2e-5), "bfloat16": (1e-2, 2e-2)}


def numbers(case: AttentionCase, kernels: AttentionKernels, directory: Path) -> dict:
    """Relative errors against the definition in float64, and the blocks of the mask of each kind."""
    (directory / "case.json").write_text(json.dumps(asdict(case)))
    for name, source in zip(("forward.py", "backward.py"), kernels.modules, strict=True):
        (directory / name).write_text(source)
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("attention_worker.py"), directory],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def check_numbers(case: AttentionCase, kernels: AttentionKernels, directory: Path) -> None:
    found = numbers(case, kernels, directory)
    bounds = [BOUNDS[case.dtype][0], *[BOUNDS[case.dtype][1]] * 3]
    for name, bound in zip(("out", "dQ", "dK", "dV"), bounds, strict=True):
        assert found["errors"][name] < bound, (case, found)  # NaN is not
    # The last queries of a pack, of a context-parallel rank, see short documents only.
    assert found["partial blocks"] and (found["full blocks"] or case.queries < case.keys), case


def check_binary(case: AttentionCase, kernels: AttentionKernels) -> None:
    limit = DEVICES[case.architecture].shared
    for direction in ("forward", "backward"):
        binary = getattr(kernels, direction)
        assert 0 < binary.shared <= limit, (case, binary)
        accepted = ACCEPTED_SPILLS.get((case.architecture, case.query_key, case.dtype, direction), 0)
        assert binary.spilled <= accepted, (case, binary)


def test_compiled_for_hopper_it_spills_nothing_and_its_numbers_are_those_of_float64(tmp_path):
    """In the tiles of NEO-2B: heads of 256 and 128, a document of several blocks with an image, many short ones."""
    case = attention_case("9.0", (256, 128), heads=(2, 1), lengths=(384, 384))
    (kernels,) = compiled([case])
    check_binary(case, kernels)
    check_numbers(case, kernels, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("architecture", DEVICES)
def test_compiled_for_any_architecture_it_fits_and_spills_no_more_than_is_accepted(architecture):
    cases = [case for case in CASES if case.architecture == architecture]
    for case, kernels in zip(cases, compiled(cases), strict=True):
        check_binary(case, kernels)


@pytest.mark.thorough
@pytest.mark.parametrize("widths", [(256, 128), (128, 128)])
@pytest.mark.parametrize("architecture", DEVICES)
def test_choices_that_are_timed_on_a_gpu_spill_nothing(architecture, widths):
    device = DEVICES[architecture]
    _, *others = choices_to_time(Widths(*widths), device.capability, device.shared)
    cases = [attention_case(architecture, widths, options=options) for options in others]
    for case, kernels in zip(cases, compiled(cases), strict=True):
        for binary in (kernels.forward, kernels.backward):
            assert binary.spilled == 0 and 0 < binary.shared <= device.shared, (case, binary)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    ("widths", "heads", "lengths", "packs"),
    [
        ((256, 128), (4, 1), (512, 512), 1),
        ((128, 128), (4, 2), (512, 512), 2),  # of U1
        ((32, 16), (2, 2), (640, 640), 3),
        ((256, 128), (2, 1), (256, 512), 1),  # of a context-parallel rank
        ((96, 48), (2, 1), (384, 384), 1),
    ],
)
@pytest.mark.parametrize("architecture", ["8.9", "9.0"])
def test_numbers_of_other_shapes(architecture, widths, heads, lengths, packs, dtype, tmp_path):
    """Two architectures, which differ in tiles; the source is the same for all."""
    case = attention_case(architecture, widths, dtype, heads, lengths, packs)
    (kernels,) = compiled([case])
    check_numbers(case, kernels, tmp_path)


def test_the_table_of_the_benchmark_has_each_kernel_and_what_it_takes(monkeypatch, capsys):
    binary = Binary("kernel", registers=255, spilled=16, shared=230960, warps=8, stages=2)
    made = AttentionKernels(binary, binary, ("", ""), ())
    monkeypatch.setattr(kernels_table, "compiled", lambda cases: [made for _ in cases])
    rows = kernels_table.measure(["10.0"]).splitlines()
    assert len(rows) == 2 + 2 * len([case for case in CASES if case.architecture == "10.0"])
    assert (
        "| 10.0 | 256, 128 | bfloat16 | 8192 x 8192 | backward | 32, 64, 128, 64 | 2, 8 | 255 | 16 | 226 of 227 |"
        in rows
    )
    assert "16384 x 131072" in rows[-1]
