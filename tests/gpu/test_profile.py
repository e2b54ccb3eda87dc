"""Three steps of four layers of NEO-2B, forward and backward, under PyTorch's profiler."""

import pytest
import torch
from gpu.conftest import has_recipe, to_gpu

from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.benchmarks.gpu_profile import profiled
from neo_megatron.presets import SIZES
from neo_megatron.validation.fp8 import fp8_format

LAYERS = SIZES["neo-2b"].replace(pre_buffer_layers=2, post_llm_layers=2)
TOKENS, WARM_UP, STEPS = 8192, 2, 3


@pytest.mark.parametrize("precision", ["bf16", "tensorwise"])
def test_three_steps_without_a_wait_of_the_host(one_gpu, transformer_engine, precision, capsys):
    """Prints shares of time by kind of kernel."""
    from neo_megatron.model.micro_batch import model_inputs
    from neo_megatron.model.neo_model import NeoModel
    from neo_megatron.model.transformer_config import NeoConfig

    if precision != "bf16" and not has_recipe(precision):
        pytest.skip(f"FP8 needs a newer GPU than {torch.cuda.get_device_name()}")
    fp8 = {} if precision == "bf16" else {"fp8": fp8_format(precision), "fp8_recipe": precision}
    config = NeoConfig.from_sizes(
        LAYERS,
        transformer_impl="transformer_engine",
        gradient_accumulation_fusion=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        **fp8,
    )
    model = NeoModel(config).cuda()
    packs = [
        (to_gpu(model_inputs(pack, first_stage=True, last_stage=True)), pack["target_weight"].cuda())
        for pack in draw_packs(LAYERS, TOKENS, WARM_UP + STEPS, seed=1)
    ]

    def steps(some) -> None:
        for inputs, weight in some:
            model.set_is_first_microbatch()
            (model(**inputs) * weight).sum().backward()

    steps(packs[:WARM_UP])  # compiles
    torch.cuda.synchronize()
    with profiled() as measured:
        steps(packs[WARM_UP:])
        torch.cuda.synchronize()
    with capsys.disabled():
        print(f"\n{precision}, {TOKENS:,} tokens, 4 layers, 3 steps")
        for kind, share in measured.kinds.items():
            print(f"{share:7.1%}  {kind}")
    assert {"products", "attention"} <= measured.kinds.keys()
    assert not measured.waits, f"the host waited for the GPU: {dict(measured.waits)}"
