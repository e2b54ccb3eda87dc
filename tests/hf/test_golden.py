"""The transformers model against the numbers of the published one: activations, logits, losses, gradients."""

import json

import pytest
import torch
from PIL import Image
from support.golden_models import MODELS, GoldenModel
from support.golden_packs import load, packed
from support.paths import GOLDEN

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.hf import attention_neo, vision_neo
from neo_megatron.hf.image_processing_neo import NEOImageProcessor
from neo_megatron.hf.modeling_neo import NEOChatModel

# Losses have tests of their own; the published merge convolution runs over canvases padded to the largest image.
NOT_HERE = ("token_nll", "loss", "vis_dense_conv_padded")
ACTIVATION, LOGIT, LOSS, GRADIENT = 3e-5, 1e-4, 1e-5, 2e-4


class Recorder:
    """Keeps what modules return and what attention is given, under the names of the golden files."""

    def __init__(self, model, monkeypatch):
        self.seen: dict[str, torch.Tensor] = {}
        self.hooks = []
        decoder, stem = model.language_model.model, model.vision_model.embeddings
        for number, layer in enumerate(decoder.layers):
            self.keep_output(layer.self_attn, f"attn_out_layer_{number}")
            self.keep_output(layer.mlp, f"mlp_out_layer_{number}")
            self.keep_output(layer, f"hidden_after_layer_{number}")
        self.keep_output(decoder.norm, "final_norm")
        self.keep_output(stem, "vit_embeds")
        self.hooks.append(
            decoder.layers[0].register_forward_pre_hook(lambda _, inputs: self.seen.update(inputs_embeds=inputs[0]))
        )
        attention, activation, rotation = attention_neo.kernel_function, vision_neo.gelu, stem.rotate

        def recorded_attention(layer, query, key, value, mask, scaling):
            number = layer.layer
            self.seen |= {f"q_layer_{number}": query, f"k_layer_{number}": key, f"v_layer_{number}": value}
            self.seen["softmax_scale"] = torch.tensor([scaling], dtype=torch.float64)
            return attention("sdpa", query.shape[2])(layer, query, key, value, mask, scaling=scaling)

        def recorded_activation(x):
            self.seen |= {"vis_patch_conv": x, "vis_patch_gelu": activation(x)}
            return self.seen["vis_patch_gelu"]

        def recorded_rotation(*inputs):
            self.seen["vis_patch_rope"] = rotation(*inputs)
            return self.seen["vis_patch_rope"]

        monkeypatch.setattr(attention_neo, "kernel_function", lambda implementation, queries: recorded_attention)
        monkeypatch.setattr(vision_neo, "gelu", recorded_activation)
        monkeypatch.setattr(stem, "rotate", recorded_rotation)

    def keep_output(self, module, name):
        """The module's output, or the first of several."""
        self.hooks.append(
            module.register_forward_hook(
                lambda _, inputs, output: self.seen.update({name: output[0] if isinstance(output, tuple) else output})
            )
        )


@pytest.fixture(scope="module", params=MODELS)
def reference(request) -> GoldenModel:
    return MODELS[request.param]


@pytest.fixture(scope="module")
def model(reference, tmp_path_factory) -> NEOChatModel:
    """The published checkpoint, or where that holds more than a NEO, what the tools export of it."""
    directory = reference.checkpoint
    if reference.name != "untied":
        room = tmp_path_factory.mktemp(reference.name)
        convert_hf_to_megatron(directory, room / "megatron")
        directory = room / "hf"
        convert_megatron_to_hf(room / "megatron", directory, load_tokenizer(GOLDEN / "tokenizer"))
    return NEOChatModel.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def recorder(model, monkeypatch):
    recorder = Recorder(model, monkeypatch)
    yield recorder
    for hook in recorder.hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["pack1", "textonly"])
def test_every_activation(golden, reference, model, recorder, name):
    expected = reference.outputs(name)
    arguments = packed(load(golden, "inputs", name))
    length = arguments["input_ids"].shape[1]
    with torch.no_grad():
        recorder.seen["logits"] = model(**arguments).logits
    compared = 0
    for key, value in expected.items():
        if key in NOT_HERE or key.startswith(("router", "expert")) or (name == "textonly" and key.startswith("vi")):
            continue
        if key[:2] in ("q_", "k_", "v_"):
            value = value[:, :, :length]
        elif value.dim() == 3:
            value = value[:, :length]
        tolerance = LOGIT if key == "logits" else ACTIVATION
        actual = recorder.seen[key].reshape(value.shape)
        torch.testing.assert_close(actual, value, atol=tolerance, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        compared += 1
    assert compared == 6 * 5 + 4 + (4 if name == "pack1" else 0)


def test_hidden_states(golden, reference, model):
    """The input of every layer, and last what the head reads."""
    expected, arguments = reference.outputs("pack1"), packed(load(golden, "inputs", "pack1"))
    with torch.no_grad():
        embeddings, *states = model(**arguments, output_hidden_states=True).hidden_states
    names = ["inputs_embeds", *(f"hidden_after_layer_{number}" for number in range(4)), "final_norm"]
    for name, state in zip(names, (embeddings, *states), strict=True):
        value = expected[name].reshape(1, -1, state.shape[-1])[:, : state.shape[1]]
        torch.testing.assert_close(state, value, atol=ACTIVATION, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", ["pack1", "textonly"])
def test_the_three_losses(golden, reference, model, name):
    inputs, mean = load(golden, "inputs", name), reference.loss(name, "token")
    with torch.no_grad():
        for weighting in reference.losses:
            loss = model(**packed(inputs), loss_weight=inputs[f"loss_weight_{weighting}"][None]).loss
            assert loss.item() == pytest.approx(reference.loss(name, weighting), abs=LOSS), weighting
        # Without weights it is the mean over the labels, as transformers' trainers expect it.
        assert model(**packed(inputs)).loss.item() == pytest.approx(mean, abs=LOSS)
        labels = int((inputs["labels"][1:] != -100).sum())
        summed = model(**packed(inputs), num_items_in_batch=2 * labels).loss.item()
        assert summed == pytest.approx(mean / 2, abs=LOSS)


def test_every_gradient(golden, reference, model):
    inputs, expected = load(golden, "inputs", "pack1"), reference.gradients()
    model.zero_grad()
    model(**packed(inputs), loss_weight=inputs[f"loss_weight_{reference.gradients_of}"][None]).loss.backward()
    actual = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = ((actual[name] - value).norm() / value.norm()).item()
        assert error < GRADIENT, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("name", ["pack1", "textonly"])
def test_a_document_alone_equals_the_document_in_its_pack(golden, reference, model, name):
    """Here positions and mask follow from the tokens, as a user calls it."""
    inputs, expected = load(golden, "inputs", name), reference.outputs(name)["logits"]
    start, end = inputs["seq_boundaries"][:2].tolist()
    images = {key: inputs[key] for key in ("pixel_values", "grid_hw") if key in inputs}
    with torch.no_grad():
        logits = model(inputs["input_ids"][:, start:end], **images).logits
    torch.testing.assert_close(logits, expected[:, start:end], atol=LOGIT, rtol=0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("reference", [name for name in MODELS if name != "neo"], indirect=True)
def test_the_published_greedy_answers(golden, reference, model, use_cache):
    """Of the published `chat`."""
    for case in json.loads((reference.directory / "generate.json").read_text())[reference.name]:
        limits = {"min_pixels": case["min_pixels"], "max_pixels": case["max_pixels"]}
        opened = [Image.open(golden / name) for name in case["images"]]
        images = NEOImageProcessor(**limits)(images=opened, return_tensors="pt")
        assert images["grid_hw"].tolist() == case["grid_hw"]
        prompt, count = torch.tensor([case["prompt_ids"]]), len(case["new_ids"])
        settings = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
        answer = model.generate(prompt, **images, **settings)
        assert answer[0, -count:].tolist() == case["new_ids"], case["question"]
