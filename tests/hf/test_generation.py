"""Decoding with a cache gives the logits of the complete sequence; batches, beams and bad input."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3ForCausalLM

from neo_megatron.checkpoint.init_qwen3 import init_from_qwen3
from neo_megatron.hf.modeling_neo import NEOChatModel

IMG, CONTEXT, PAD = 897, 896, 870


@pytest.fixture(scope="module")
def quiet(golden):
    """The golden model with a head whose logits stay around one, so that 1e-5 is far above float32's rounding."""
    model = NEOChatModel.from_pretrained(golden / "ckpt_untied", dtype=torch.float32).eval()
    model.language_model.lm_head.weight.data /= 20
    return model


def step_by_step(model, input_ids, prefill, attention_mask=None, **images):
    """Logits of every token: the first ones at once, the others one at a time from the cache, as a user's own loop."""
    logits, cache = [], None
    for start, end in [(0, prefill), *((i, i + 1) for i in range(prefill, input_ids.shape[1]))]:
        mask = None if attention_mask is None else attention_mask[:, :end]
        out = model(
            input_ids[:, start:end],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **(images if not start else {}),
        )
        logits.append(out.logits)
        cache = out.past_key_values
    return torch.cat(logits, dim=1)


def padded(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of tokens padded on the left, and their mask."""
    length = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((length - len(row),), PAD), row]) for row in rows])
    mask = torch.stack([torch.arange(length) >= length - len(row) for row in rows]).long()
    return ids, mask


@pytest.mark.parametrize("prefill", [55, 101])
@torch.no_grad()
def test_cached_logits_equal_those_of_a_full_forward(quiet, document, prefill):
    """The document has two images in its first 40 tokens."""
    complete = quiet(**document).logits
    assert complete.abs().max() < 2
    torch.testing.assert_close(step_by_step(quiet, prefill=prefill, **document), complete, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_image_may_follow_the_cache(quiet, document):
    """A second question with another image: the cache goes on with patches of its own."""
    ids, grids = document["input_ids"], document["grid_hw"]
    second = int((ids[0] == IMG).nonzero()[1])
    patches = document["pixel_values"].split(grids.prod(dim=-1).tolist())
    first = quiet(ids[:, :second], patches[0], grids[:1], use_cache=True)
    rest = quiet(ids[:, second:], patches[1], grids[1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(rest.logits, quiet(**document).logits[:, second:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_left_padding_changes_nothing(quiet, document, golden):
    """Two rows: one with images, a shorter one of text, padded in front."""
    row, text = document["input_ids"][0], load_file(golden / "inputs_textonly.safetensors")["input_ids"][0, :37]
    ids, mask = padded(text, row)
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    expected_text, expected_row = quiet(text[None]).logits[0], quiet(**document).logits[0]
    for logits in (
        quiet(ids, attention_mask=mask, **images).logits,
        step_by_step(quiet, ids, 70, attention_mask=mask, **images),
    ):
        torch.testing.assert_close(logits[0, -len(text) :], expected_text, atol=1e-5, rtol=0)
        torch.testing.assert_close(logits[1], expected_row, atol=1e-5, rtol=0)
        assert logits.isfinite().all()


@torch.no_grad()
def test_generate(model, document, golden):
    """Greedy with and without the cache, and a padded batch: the same tokens; each follows from a complete forward."""
    row, text = document["input_ids"][0, :60], load_file(golden / "inputs_textonly.safetensors")["input_ids"][0, :37]
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    answers = []
    for prompt, patches in ((row, images), (text, {})):
        mask = torch.ones_like(prompt[None])
        cached = model.generate(prompt[None], attention_mask=mask, **patches, **settings)
        uncached = model.generate(prompt[None], attention_mask=mask, **patches, **settings, use_cache=False)
        assert cached.tolist() == uncached.tolist()
        following = model(cached[:, :-1], **patches).logits[0, len(prompt) - 1 :].argmax(dim=-1)
        assert cached[0, len(prompt) :].tolist() == following.tolist()
        answers.append(cached[0, len(prompt) :].tolist())
    ids, mask = padded(row, text)
    batch = model.generate(ids, attention_mask=mask, **images, **settings)
    assert batch[:, ids.shape[1] :].tolist() == answers


@torch.no_grad()
def test_generate_goes_on_from_a_cache(model, document):
    """It holds the first of two images: the second is still looked at, and must be given."""
    ids, grids = document["input_ids"][:, :60], document["grid_hw"]
    second = int((ids[0] == IMG).nonzero()[1])
    patches = document["pixel_values"].split(grids.prod(dim=-1).tolist())
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    expected = model.generate(ids, **images, **settings).tolist()

    def cache(stop, held):
        complete = model(ids[:, :stop], torch.cat(patches[:held]), grids[:held], use_cache=True)
        return complete.past_key_values

    assert model.generate(ids, **images, past_key_values=cache(second, 1), **settings).tolist() == expected
    assert model.generate(ids, past_key_values=cache(50, 2), **settings).tolist() == expected
    for given, number in (({}, 0), ({"pixel_values": patches[1], "grid_hw": grids[1:]}, 1)):
        with pytest.raises(ValueError, match=f"{number} images for 2 in input_ids: pass .* of all of them"):
            model.generate(ids, **given, past_key_values=cache(second, 1), **settings)


@torch.no_grad()
def test_beams_keep_their_images(model, document):
    """Rows with different numbers of images, three beams each: as each row alone."""
    ids, grids = document["input_ids"][0], document["grid_hw"]
    patches = document["pixel_values"].split(grids.prod(dim=-1).tolist())
    second = int((ids == IMG).nonzero()[1])
    settings = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    rows = [(ids[:60], patches, grids), (ids[:second], patches[:1], grids[:1])]
    alone = [
        model.generate(
            row[None], attention_mask=torch.ones_like(row[None]), pixel_values=torch.cat(part), grid_hw=grid, **settings
        )[0, len(row) :].tolist()
        for row, part, grid in rows
    ]
    batch, mask = padded(*(row for row, _, _ in rows))
    together = model.generate(
        batch,
        attention_mask=mask,
        pixel_values=torch.cat([part for _, parts, _ in rows for part in parts]),
        grid_hw=torch.cat([grid for _, _, grid in rows]),
        **settings,
    )
    assert together[:, batch.shape[1] :].tolist() == alone


@torch.no_grad()
def test_on_text_a_new_neo_is_qwen3(golden, tmp_path):
    """No pre-buffer, K_hw = 0: transformers' own Qwen3 with the same weights."""
    with pytest.warns(UserWarning, match="no tokenizer"):
        init_from_qwen3(golden / "qwen3_untied", tmp_path / "neo", pre_buffer_layers=0, patch_embedding_size=32)
    neo = NEOChatModel.from_pretrained(tmp_path / "neo", dtype=torch.float32).eval()
    qwen3 = Qwen3ForCausalLM.from_pretrained(golden / "qwen3_untied", dtype=torch.float32).eval()
    ids = torch.randint(0, 870, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mine, theirs = neo(ids, attention_mask=mask).logits, qwen3(ids, attention_mask=mask).logits
    torch.testing.assert_close(mine[mask == 1], theirs[mask == 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_stay_exact_in_bfloat16(model, document):
    """Frequencies in bfloat16 would be radians off far into a sequence; cos and sin are those of float32."""
    seen = []
    low = copy.deepcopy(model).bfloat16()
    for network in (model, low):
        layer = network.language_model.model.layers[0]
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
        positions = torch.zeros(*document["input_ids"].shape, 3, dtype=torch.long)
        positions[0, :, 0] = torch.arange(positions.shape[1]) + 16384
        images = {key: document[key] for key in ("pixel_values", "grid_hw")}
        network(document["input_ids"], positions_thw=positions, **images)
        hook.remove()
    for exact, other in zip(*seen, strict=True):
        assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(exact, other, strict=True))


def test_gradient_checkpointing_gives_the_same_gradients(model, document):
    trained = copy.deepcopy(model).train()
    gradients = []
    for _ in range(2):
        trained.zero_grad()
        trained(**document, labels=document["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in trained.named_parameters()})
        trained.gradient_checkpointing_enable()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda a: a.pop("pixel_values"), "pass pixel_values and grid_hw"),
        (
            lambda a: a.update(grid_hw=a["grid_hw"].flip(0)),
            r"the images take \[12, 15\] tokens, input_ids have \[15, 12\]",
        ),
        (lambda a: a.update(pixel_values=a["pixel_values"][4:]), "104 patches do not fit grid_hw"),
        (lambda a: a.update(attention_mask=torch.ones(1, 7)), r"of shape \[1, 7\] for \[1, 102\] tokens"),
        (lambda a: a.update(attention_mask=torch.ones(1, 1, 102, 102)), "pass positions_thw with it"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, document, change, sentence):
    arguments = dict(document)
    change(arguments)
    if "pixel_values" not in arguments:
        arguments.pop("grid_hw")
    with pytest.raises(ValueError, match=sentence):
        model(**arguments)


@torch.no_grad()
def test_a_changed_cache_is_refused(model, document):
    out = model(**document, use_cache=True)
    out.past_key_values.crop(50 - document["input_ids"].shape[1])  # how many to drop, as a negative number
    with pytest.raises(ValueError, match="the cache was changed"):
        model(document["input_ids"][:, 50:51], past_key_values=out.past_key_values)
    repeated = model(**document, use_cache=True).past_key_values
    repeated.batch_repeat_interleave(2)
    with pytest.raises(ValueError, match="the cache was changed"):
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=repeated)


@pytest.mark.parametrize("change, sentence", [("lacks", "lacks"), ("has", "has the unexpected")])
def test_a_part_of_a_checkpoint_is_refused(golden, tmp_path, change, sentence):
    """transformers alone would fill a gap with random numbers and only warn of it."""
    (tmp_path / "config.json").write_text((golden / "ckpt_untied" / "config.json").read_text())
    tensors = load_file(golden / "ckpt_untied" / "model.safetensors")
    name = "language_model.model.layers.3.self_attn.k_proj_hw.weight"
    if change == "lacks":
        del tensors[name]
    else:
        name = name.replace("k_proj", "x_proj")
        tensors[name] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{tmp_path} {sentence} {name}"):
        NEOChatModel.from_pretrained(tmp_path)


def test_a_larger_vocabulary(golden, tmp_path):
    """Rows that a user adds for tokens of his own are there again after saving."""
    model = NEOChatModel.from_pretrained(golden / "ckpt_untied")
    model.resize_token_embeddings(1100)
    assert model.config.llm_config.vocab_size == 1100
    model.save_pretrained(tmp_path)
    again = NEOChatModel.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight.shape[0] == again.get_input_embeddings().weight.shape[0] == 1100


def test_a_tied_model_keeps_one_parameter(golden, tmp_path):
    """Loaded from a checkpoint without a head, saved without one."""
    config = json.loads((golden / "ckpt_untied" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(golden / "ckpt_untied" / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = NEOChatModel.from_pretrained(tmp_path)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, tensors["language_model.model.embed_tokens.weight"])
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


@torch.no_grad()
def test_a_generated_image_token_is_plain_text(model, document):
    """A model may say <IMG_CONTEXT>; it has no image for it, and must not fall over it."""
    ids = torch.cat([document["input_ids"][:, :60], torch.tensor([[CONTEXT, 5]])], dim=1)
    images = {key: document[key] for key in ("pixel_values", "grid_hw")}
    complete = model(ids, **images).logits
    torch.testing.assert_close(step_by_step(model, ids, 60, **images), complete, atol=1e-4, rtol=0)


def test_padding_does_not_count_as_a_position(model, document, golden):
    """The golden positions, with nine tokens of padding in front."""
    ids, published = document["input_ids"], load_file(golden / "inputs_pack1.safetensors")["positions_thw"]
    padded_ids = torch.cat([ids.new_full((1, 9), PAD), ids], dim=1)
    mask = torch.cat([ids.new_zeros(1, 9), torch.ones_like(ids)], dim=1)
    inputs = model.prepare_inputs_for_generation(padded_ids, attention_mask=mask, grid_hw=document["grid_hw"])
    assert inputs["positions_thw"][0, 9:].tolist() == published[: ids.shape[1]].tolist()
    assert not inputs["positions_thw"][0, :9].any()
