"""The kernel of norms and rotations on a GPU: numbers, and the same bytes in every run."""

import pytest
import torch
from support.norm_rotary_cases import EPS, Case, at_once, excesses, results


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["separate", "in-head"])
def test_against_float64(form, dtype, gpu, poisoned):
    from neo_megatron.model.gpu_kernels.norm_rotary import NormRotary

    for shape, frozen, strides in (
        ((700, 2, 2, 2, 128), (), "heads first"),
        ((37, 1, 2, 3, 24), (0, 3), "plain"),
        ((64, 1, 1, 4, 32), (1, 2), "expanded"),
    ):
        case = Case(form, shape, dtype, frozen, strides=strides)
        poisoned()
        found = [x.cpu() for x in results(NormRotary.apply, case, "cuda")]
        errors = excesses(found, results(at_once, case, dtype=torch.float64))
        assert all(error < 1 for error in errors), (case, errors)  # NaN is not


def test_the_same_bytes_in_every_run(gpu):
    from neo_megatron.model.gpu_kernels.norm_rotary import NormRotary

    case = Case("separate", (4096, 1, 4, 2, 128), "bfloat16")
    first, second = (results(NormRotary.apply, case, "cuda") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def test_other_lengths_are_not_compiled_again(gpu):
    """Tokens that are multiples of 16, and others: a kernel for each."""
    from neo_megatron.model.gpu_kernels import norm_rotary

    def run(tokens: int) -> int:
        case = Case("in-head", (tokens, 1, 2, 2, 64), "bfloat16")
        norm_rotary.NormRotary.apply(case.tables("cuda"), EPS, *case.tensors("cuda"))
        caches = norm_rotary.norm_rotary_forward.device_caches
        return sum(len(cache[0]) for cache in caches.values())

    run(64), run(65)
    before = run(128)
    assert run(144) == run(129) == before
