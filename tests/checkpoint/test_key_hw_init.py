"""Both starts of the new keys compute the same function, Qwen3's on text; only one has gradients of ordinary size."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.hf.modeling_neo import NEOChatModel

PRE_BUFFER = 2
ATTENTION = "language_model.model.layers.{}.self_attn."


@pytest.fixture(scope="module")
def starts(golden, tokenizer, tmp_path_factory) -> dict[str, str]:
    """A NEO for each way; with ``-text`` one without a pre-buffer, which is all post-LLM."""
    room = tmp_path_factory.mktemp("starts")
    made = {}
    for way in ("published", "zero-norm"):
        for name, layers in ((way, PRE_BUFFER), (f"{way}-text", 0)):
            made[name] = room / name
            init_from_qwen3(*(golden / "qwen3_untied", made[name], layers), 32, tokenizer=tokenizer, key_hw_init=way)
    return made


def neo(directory) -> NEOChatModel:
    return NEOChatModel.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def document(golden) -> dict[str, torch.Tensor]:
    """Text and two images."""
    inputs = load_file(golden / "inputs_pack1.safetensors")
    length = int(inputs["seq_boundaries"][1])
    return {"input_ids": inputs["input_ids"][:, :length]} | {key: inputs[key] for key in ("pixel_values", "grid_hw")}


def test_nothing_else_differs(starts):
    published, other = (load_file(starts[way] / "model.safetensors") for way in ("published", "zero-norm"))
    assert published.keys() == other.keys()
    changed = {name for name in published if not torch.equal(published[name], other[name])}
    kinds = ("k_proj_hw", "k_norm_h", "k_norm_w")
    post_llm = range(PRE_BUFFER, PRE_BUFFER + 3)
    assert changed == {ATTENTION.format(layer) + f"{kind}.weight" for layer in post_llm for kind in kinds}
    for layer in post_llm:
        attention = ATTENTION.format(layer)
        assert not other[attention + "k_norm_h.weight"].any() and not other[attention + "k_norm_w.weight"].any()
        key, key_hw = (other[attention + f"{name}.weight"] for name in ("k_proj", "k_proj_hw"))
        head_dim = other[attention + "k_norm.weight"].numel()
        quarter = head_dim // 4
        for head in range(len(key) // head_dim):
            rows = key[head * head_dim : (head + 1) * head_dim]
            first, third = rows[:quarter], rows[2 * quarter : 3 * quarter]
            expected = torch.cat((first, third, first, third))
            assert torch.equal(key_hw[head * head_dim : (head + 1) * head_dim], expected)


def test_both_compute_what_qwen3_computes_on_text(golden, starts):
    tokens = load_file(golden / "inputs_textonly.safetensors")["input_ids"][:, :60]
    qwen3 = Qwen3ForCausalLM.from_pretrained(golden / "qwen3_untied", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = qwen3(tokens).logits
        published, other = (neo(starts[f"{way}-text"])(tokens).logits for way in ("published", "zero-norm"))
    torch.testing.assert_close(other, expected, atol=1e-5, rtol=0)
    assert torch.equal(other, published)


def test_both_compute_the_same_with_images(starts, document):
    with torch.no_grad():
        published, other = (neo(starts[way])(**document).logits for way in ("published", "zero-norm"))
    assert torch.equal(other, published)


def test_the_first_gradient_is_of_ordinary_size(starts, document):
    """RMSNorm multiplies the published one by 1/sqrt(1e-6); with the other, the norms of the keys begin to move."""
    norms = {}
    for way in ("published", "zero-norm"):
        model = neo(starts[way])
        model(**document, labels=document["input_ids"]).loss.backward()
        kinds = {"k_proj_hw": 0.0, "k_norm_": 0.0, "q_proj_hw": 0.0, "else": 0.0}
        for name, parameter in model.named_parameters():
            layer = name.removeprefix("language_model.model.layers.").split(".")[0]
            post_llm = layer.isdigit() and int(layer) >= PRE_BUFFER
            kind = next((kind for kind in kinds if post_llm and f".{kind}" in name), "else")
            kinds[kind] += parameter.grad.norm().item() ** 2
        norms[way] = {kind: square**0.5 for kind, square in kinds.items()}
    published, other = norms["published"], norms["zero-norm"]
    assert published["else"] == pytest.approx(other["else"], rel=1e-5)
    assert published["k_proj_hw"] > 20 * published["else"]
    assert published["q_proj_hw"] == other["q_proj_hw"] == other["k_proj_hw"] == 0
    assert 1e-4 * other["else"] < other["k_norm_"] < other["else"]
    assert published["k_proj_hw"] > 300 * other["k_norm_"]


@pytest.mark.parametrize("way", ["published", "zero-norm"])
def test_the_round_trip_through_megatron_is_bit_equal(starts, tokenizer, tmp_path, way):
    convert_hf_to_megatron(starts[way], tmp_path / "megatron")
    convert_megatron_to_hf(tmp_path / "megatron", tmp_path / "back", tokenizer)
    before, after = (load_file(path / "model.safetensors") for path in (starts[way], tmp_path / "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
