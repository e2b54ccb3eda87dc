"""bfloat16, and weights that lie elsewhere than where they are used, as `device_map` places them."""

import copy

import pytest
import torch

from neo_megatron.data.chat import load_tokenizer
from neo_megatron.hf.modeling_neo import NEOChatModel

pytest.importorskip("accelerate", reason="accelerate is missing, which device_map asks for")
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 870}


@torch.no_grad()
def test_weights_on_disk(model, document, golden, tmp_path):
    """Every module fetches its own weights when it runs: what a GPU that is too small for the model does."""
    places = {"vision_model": "disk", "language_model.lm_head": "disk", "language_model.model.embed_tokens": "cpu"}
    layers = {f"language_model.model.layers.{number}": "disk" if number < 3 else "cpu" for number in range(5)}
    device_map = places | layers | {"language_model.model.norm": "cpu"}
    split = NEOChatModel.from_pretrained(
        golden / "ckpt_untied", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path
    )
    assert split.vision_model.embeddings.patch_embedding.weight.is_meta
    torch.testing.assert_close(split(**document).logits, model(**document).logits, atol=1e-4, rtol=0)
    assert split.generate(**document, **GREEDY).tolist() == model.generate(**document, **GREEDY).tolist()
    tokenizer, greedy = load_tokenizer(golden / "tokenizer"), {"max_new_tokens": 4, "do_sample": False}
    assert split.chat(tokenizer, None, "Hi", greedy) == model.chat(tokenizer, None, "Hi", greedy)


@torch.no_grad()
def test_a_device_map_does_not_split_layers(golden):
    from accelerate import infer_auto_device_map

    model = NEOChatModel.from_pretrained(golden / "ckpt_untied", dtype=torch.float32, device_map="auto")
    half = sum(parameter.nbytes for parameter in model.parameters()) // 2
    device_map = infer_auto_device_map(
        model, {0: half, "cpu": 4 * half}, no_split_module_classes=model._no_split_modules
    )
    assert {0, "cpu"} == set(device_map.values())
    assert not any("layers." in name and name.count(".") > 3 for name in device_map), device_map


@torch.no_grad()
def test_bfloat16(model, document):
    """Norms, rotations and softmax in float32: as near to float32 as eight bits of fraction allow."""
    low = copy.deepcopy(model).bfloat16()
    for implementation in ("sdpa", "eager"):
        low.set_attn_implementation(implementation)
        logits, exact = low(**document).logits, model(**document).logits
        assert logits.dtype == torch.bfloat16
        error = (logits.float() - exact).norm() / exact.norm()
        assert error < 0.03, (implementation, error)
    assert low.generate(**document, **GREEDY).shape[1] == document["input_ids"].shape[1] + 4
    assert low(**document, labels=document["input_ids"]).loss.dtype == torch.float32
