"""The three kernels of `attn_implementation`: one result, and the attention weights of the eager one."""

import copy

import pytest
import torch
from support.golden_packs import flattened, load, packed
from support.markers import every_variant

from neo_megatron.hf.modeling_neo import NEOChatModel


@pytest.fixture(scope="module", autouse=True)
def uncompiled():
    """FlexAttention's own plain form: compiling takes half a minute, and is PyTorch's affair."""
    with torch.compiler.set_stance("force_eager"):
        yield


def with_kernel(model: NEOChatModel, implementation: str) -> NEOChatModel:
    other = copy.deepcopy(model)
    other.set_attn_implementation(implementation)
    return other


@every_variant
@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
@torch.no_grad()
def test_kernels_agree(checkpoint, document, implementation):
    """A document with images, padded in front: prefill, then tokens over the cache."""
    model = NEOChatModel.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.nn.functional.pad(document["input_ids"], (9, 0), value=870)
    mask = (torch.arange(ids.shape[1]) >= 9).long()[None]
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    expected = model(ids, attention_mask=mask, **images).logits[:, 9:]
    other = with_kernel(model, implementation)
    first = other(ids[:, :90], attention_mask=mask[:, :90], **images, use_cache=True)
    rest = [first.logits[:, 9:]]
    for stop in (91, 92, ids.shape[1]):
        start = first.past_key_values.get_seq_length()
        cache = first.past_key_values
        rest.append(other(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(rest, dim=1), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", ["pack1", "textonly"])
@torch.no_grad()
def test_packed_documents(model, golden, implementation, name):
    """Positions, documents and images of a complete pack follow from its tokens: the published logits."""
    arguments = flattened(load(golden, "inputs", name))
    logits = with_kernel(model, implementation)(**arguments).logits
    expected = load(golden, "outputs_untied", name)["logits"][:, : logits.shape[1]]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["pack1", "textonly"])
@torch.no_grad()
def test_positions_of_a_pack(model, golden, name):
    """The published ones: t begins again at 0 in every document. Logits would not tell, as a rotation is relative."""
    inputs, seen = load(golden, "inputs", name), []
    decoder = model.language_model.model
    hook = decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[1]))
    model(**flattened(inputs))
    hook.remove()
    assert seen[0].tolist() == inputs["positions_thw"][None].tolist()


@torch.no_grad()
def test_attention_weights(model, golden):
    """Of every layer, against the published queries and keys."""
    expected, inputs = load(golden, "outputs_untied", "pack1"), load(golden, "inputs", "pack1")
    arguments = packed(inputs)
    length = arguments["input_ids"].shape[1]
    weights = with_kernel(model, "eager")(**arguments, output_attentions=True).attentions
    assert len(weights) == 5
    for number, layer in enumerate(weights):
        query, key = (expected[f"{part}_layer_{number}"][:, :, :length].double() for part in "qk")
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ key.transpose(2, 3) * expected["softmax_scale"].double()
        dense = scores.masked_fill(~inputs["attention_mask_dense"], -torch.inf).softmax(dim=-1)
        torch.testing.assert_close(layer.double(), dense, atol=3e-5, rtol=0)


@torch.no_grad()
def test_weights_of_every_generated_token(model, document):
    """`generate` collects them, and a hook sees those of one layer without keeping the others'."""
    eager, seen = with_kernel(model, "eager"), []
    hook = eager.language_model.model.layers[3].self_attn.register_forward_hook(lambda *call: seen.append(call[2][1]))
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 870}
    out = eager.generate(**document, **settings, output_attentions=True, return_dict_in_generate=True)
    hook.remove()
    length = document["input_ids"].shape[1]
    assert [step[3].shape[2:] for step in out.attentions] == [(length, length), (1, length + 1), (1, length + 2)]
    assert all(torch.equal(step[3], weights) for step, weights in zip(out.attentions, seen, strict=True))


def test_the_fused_kernels_have_no_weights(model, document):
    with pytest.raises(ValueError, match=r"sdpa returns no attention weights: call model.set_attn_implementation"):
        model(**document, output_attentions=True)


def test_flex_attention_takes_no_dense_mask(model, golden):
    with pytest.raises(ValueError, match="pass position_ids"):
        with_kernel(model, "flex_attention")(**packed(load(golden, "inputs", "textonly")))
