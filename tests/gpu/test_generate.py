"""The exported model on the GPU: the answers of the CPU, and FlexAttention's logits those of SDPA."""

import pytest
import torch
from gpu.conftest import relative_error, to_gpu
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def document(golden) -> dict[str, torch.Tensor]:
    """The first golden document, two images in it."""
    inputs = load_file(golden / "inputs_pack1.safetensors")
    length = int(inputs["seq_boundaries"][1])
    return {"input_ids": inputs["input_ids"][:, :length]} | {key: inputs[key] for key in ("pixel_values", "grid_hw")}


def load(golden, dtype: torch.dtype = torch.float32):
    from neo_megatron.hf.modeling_neo import NEOChatModel

    return NEOChatModel.from_pretrained(golden / "ckpt_untied", dtype=dtype).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_generates_what_a_cpu_does(gpu, golden, document, implementation):
    settings = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 870}
    expected = load(golden).generate(**document, **settings)
    model = load(golden).to(gpu)
    model.set_attn_implementation(implementation)
    assert model.generate(**to_gpu(document), **settings).tolist() == expected.tolist()


def test_flex_attention_in_bf16(gpu, golden, document):
    expected = load(golden)(**document, use_cache=False).logits
    model = load(golden, torch.bfloat16).to(gpu)
    model.set_attn_implementation("flex_attention")
    logits = model(**to_gpu(document), use_cache=False).logits
    assert relative_error(logits, expected) < 3e-2
