"""The kernel of norms and rotations: its numbers, in Triton's interpreter, and what it takes of a GPU, compiled for it.

Neither needs a GPU. tests/gpu/test_norm_rotary.py has the same numbers on one.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.norm_rotary_cases import EPS, Case
from support.paths import ROOT

from neo_megatron.benchmarks.kernel_binaries import DEVICES, Binary, compile_kernel
from neo_megatron.model.gpu_kernels import norm_rotary

FORMS = ("separate", "in-head")
# 70 tokens of NEO's heads are more than one program, and the last of them has no full tile. Widths of heads are 128 in
# all published models; 16 that of the tiny one; of 24 the parts are no powers of two.
WIDE, ODD = (35, 2, 1, 2, 128), (5, 1, 2, 3, 24)
SAMPLE = [
    *(Case(form, WIDE) for form in FORMS),
    *(Case(form, ODD, "bfloat16", norms="float32") for form in FORMS),
    Case("in-head", (3, 2, 2, 1, 16), "float16", strides="heads first"),
    Case("separate", (3, 2, 2, 2, 16), frozen=(0,), strides="expanded"),
    Case("separate", (3, 1, 2, 2, 16), frozen=(1, 2, 5)),
    Case("separate", (3, 1, 2, 2, 16), frozen=(2, 3, 4, 5, 6, 7)),
    Case("in-head", (3, 1, 2, 2, 16), frozen=(0, 2)),
]
REST = [
    *(
        Case(form, shape, dtype, strides=strides)
        for form in FORMS
        for shape in ((1, 1, 1, 1, 8), (150, 1, 1, 1, 16), (9, 3, 2, 4, 32), (67, 1, 2, 4, 128), (7, 2, 1, 2, 40))
        for dtype in ("float32", "bfloat16", "float16")
        for strides in ("plain", "heads first")
    ),
    *(Case("separate", (3, 1, 1, 2, 16), frozen=frozen) for frozen in ((0, 2, 5), (1,), (3, 4, 6, 7), (0, 1), (3,))),
    *(Case("in-head", (3, 1, 1, 2, 16), frozen=frozen) for frozen in ((0,), (1, 3), (2, 4), (1, 2, 3, 4))),
]


def interpreted(cases: list[Case]) -> list[dict]:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("norm_rotary_worker.py")],
        input="\n".join(json.dumps(asdict(case)) for case in cases),
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(cases: list[Case]) -> None:
    for case, found in zip(cases, interpreted(cases), strict=True):
        tensors = case.tensors()
        assert all(error < 1 for error in found["errors"]), (case, found["errors"])  # NaN is not
        kinds = [tensors[0].dtype] * 3 + [x.dtype for x in tensors if x.requires_grad]
        assert found["dtypes"] == [str(kind) for kind in kinds], case
        assert found["memory"] == memory_of(case), case


def memory_of(case: Case) -> list:
    """Whether each projection has a gradient, and the columns of the sums: of the norms for t, and for h and w."""
    projections, norms = (2, 3) if case.form == "separate" else (1, 2)
    trained = [place not in case.frozen for place in range(projections + 2 * norms)]
    half = case.shape[-1] * projections // 2
    query, key = trained[projections:-norms], trained[-norms:]
    return [*trained[:projections], half * (query[0] or key[0]) + half * any((*query[1:], *key[1:]))]


def test_heads_and_gradients_are_those_of_float64():
    check(SAMPLE)


@pytest.mark.thorough
def test_every_width_dtype_and_frozen_part():
    check(REST)


@pytest.fixture
def launched(monkeypatch):
    """Runs a case on tensors without values; returns kernels with what they are launched with."""
    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *tensors, **constants: launches.append((self.kernel, grid, tensors, constants))

    def run(case: Case):
        for name in ("norm_rotary_forward", "norm_rotary_backward"):
            monkeypatch.setattr(norm_rotary, name, Recorder(getattr(norm_rotary, name)))
        tensors = [x.detach().to("meta").requires_grad_(x.requires_grad) for x in case.tensors()]
        heads = norm_rotary.NormRotary.apply([(x.to("meta"), y.to("meta")) for x, y in case.tables()], EPS, *tensors)
        torch.autograd.grad(heads, [x for x in tensors if x.requires_grad], [torch.empty_like(x) for x in heads])
        monkeypatch.undo()
        return launches

    return run


def compiled(launch, architecture: str) -> Binary:
    kernel, _, given, constants = launch
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    named = dict(zip(kernel.arg_names, given, strict=False))
    kinds = {
        name: types[x.dtype] if isinstance(x, torch.Tensor) else "i32" if isinstance(x, int) else "fp32"
        for name, x in named.items()
    }
    multiples = [name for name, x in named.items() if isinstance(x, int) and x % 16 == 0]
    warps = constants.pop("num_warps")
    return compile_kernel(kernel, kinds, constants, architecture, num_warps=warps, multiples_of_16=multiples)


# 128 tokens of NEO-2B and of SenseNova-U1-8B: 8 key-value heads with 2 and 4 query heads each, of 128 channels.
NEO = {"separate": (128, 1, 8, 2, 128), "in-head": (128, 1, 8, 4, 128)}


def check_binaries(launches, architecture: str) -> None:
    """Nothing is spilled, and registers leave room for at least 12 warps of the 64 of a multiprocessor."""
    for launch in launches:
        binary = compiled(launch, architecture)
        assert binary.spilled == 0 and binary.registers <= 168, (architecture, binary)
        assert binary.shared <= 1024


@pytest.mark.parametrize("form", FORMS)
def test_compiled_for_hopper_it_spills_nothing(form, launched):
    check_binaries(launched(Case(form, NEO[form], "bfloat16")), "9.0")


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("frozen", ["nothing", "norms"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", DEVICES)
def test_compiled_for_any_architecture_it_spills_nothing(architecture, form, frozen, dtype, launched):
    norms = {"separate": (2, 5), "in-head": (1, 3)}[form] if frozen == "norms" else ()
    check_binaries(launched(Case(form, NEO[form], dtype, frozen=norms)), architecture)


def test_programs_and_sums_of_a_layer(launched):
    """2,100 tokens of 8 key-value heads: tiles of 16 forward, and eight tiles of 8 in each program backward."""
    forward, backward = launched(Case("separate", (1050, 2, 8, 2, 128), "bfloat16"))
    assert forward[1] == (132 * 8,) and backward[1] == (33 * 8,)


@pytest.mark.parametrize(("form", "forward", "backward"), [("separate", 209.7, 348.1), ("in-head", 172.0, 290.5)])
def test_bytes_moved_by_a_layer(form, forward, backward, launched):
    """MB for 8,192 tokens, as in docs/gpu.md. All once, but values stay, and sums are written and read by PyTorch."""
    case = Case(form, NEO[form], "bfloat16")
    tokens, packs, groups, _, width = case.shape
    values = tokens * packs * groups * width * 2
    for launch, moved in zip(launched(case), (forward, backward), strict=True):
        tensors = {id(x): x for x in launch[2] if isinstance(x, torch.Tensor)}
        sums = launch[2][7] if moved == backward else torch.empty(0)
        bytes_moved = sum(x.nbytes for x in tensors.values() if x.dim() > 1) - values + sums.nbytes
        assert bytes_moved * 8192 / tokens / 1e6 == pytest.approx(moved, abs=0.1)


def test_nothing_is_kept_but_inputs_and_values_are_not_copied(monkeypatch):
    for name in ("launch_forward", "launch_backward"):
        monkeypatch.setattr(norm_rotary, name, lambda *_: None)
    case, kept = Case("separate", (5, 2, 2, 3, 16)), []
    tensors = case.tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        value = norm_rotary.NormRotary.apply(case.tables(), EPS, *tensors)[2]
    assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in tensors]
    assert value.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
    assert value.shape == (5, 2, 2, 16) and torch.equal(value, tensors[0][..., -1, :])
