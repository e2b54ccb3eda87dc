"""Arguments of `forward` and `generate()`: each is used, or an error names it."""

import pytest
import torch
from support.golden_packs import flattened, load, packed

PAD = 870
IMAGES = ("pixel_values", "grid_hw")


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("pixel_value", "did you mean pixel_values"),
        ("attention_masks", "did you mean attention_mask"),
        ("cu_seq_len_q", "it takes input_ids"),
        ("zzz", "it takes input_ids, pixel_values, grid_hw, "),
    ],
)
def test_an_unknown_argument_is_refused(model, document, name, remedy):
    with pytest.raises(TypeError, match=f"the argument '{name}', which it does not know: .*{remedy}"):
        model(**document, **{name: torch.ones(1)})
    with pytest.raises(TypeError, match=f"the argument '{name}', which it does not know"):
        model.base_model(**document, **{name: torch.ones(1)})
    with pytest.raises((TypeError, ValueError), match=name):
        model.generate(**document, **{name: torch.ones(1)}, max_new_tokens=2)
    with pytest.raises(TypeError, match=f"got {name}, which NEO does not take"):
        model.prepare_inputs_for_generation(**document, **{name: torch.ones(1)})


@torch.no_grad()
def test_the_documents_of_a_pack(model, golden):
    """However a collator tells them; a contradiction is an error."""
    pack = flattened(load(golden, "inputs", "pack1"))
    ends = load(golden, "inputs", "pack1")["seq_boundaries"].int()
    position_ids = pack.pop("position_ids")
    expected, longest = model(**pack, position_ids=position_ids).logits, int(ends.diff().max())
    number = torch.repeat_interleave(torch.arange(len(ends) - 1), ends.diff())[None]
    packing = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    for told in (packing, {"cu_seq_lens_q": ends}, {"seq_idx": number}, packing | {"seq_idx": number}):
        assert torch.equal(model(**pack, **told).logits, expected)
        assert torch.equal(model(**pack, **told, position_ids=position_ids).logits, expected)
    for wrong, sentence in (
        ({"cu_seq_lens_q": ends[:-1]}, "cu_seq_lens_q runs from 0 to"),
        ({"cu_seq_lens_q": ends, "cu_seq_lens_k": ends[[0, -1]]}, "cu_seq_lens_q and cu_seq_lens_k do not say"),
        ({"position_ids": position_ids, "seq_idx": number * 0}, "position_ids and seq_idx do not say"),
        ({"max_length_q": longest}, "say nothing without cu_seq_lens_q"),
        ({"cu_seq_lens_q": ends, "max_length_q": 7}, f"max_length_q is 7, the longest document has {longest}"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(**pack, **wrong)


@pytest.mark.parametrize(
    "name", ["positions_thw", "loss_weight", "inputs_embeds", "num_items_in_batch", "cu_seq_lens_q", "max_length_k"]
)
def test_generate_refuses_arguments_that_it_would_drop(model, document, name):
    with pytest.raises((TypeError, ValueError), match=name):
        model.generate(**document, **{name: torch.ones(1, 102, 64)}, max_new_tokens=2)


def test_generate_takes_one_document_in_each_row(model, document):
    """Packs have position_ids that start again; a row's own count, from a padded batch, is right."""
    ids = document["input_ids"]
    with pytest.raises(ValueError, match="position_ids count several documents in a row"):
        model.generate(**document, position_ids=(torch.arange(ids.shape[1]) % 50)[None], max_new_tokens=2)
    expected = model.generate(**document, max_new_tokens=2).tolist()
    counted = torch.arange(ids.shape[1])[None]
    assert model.generate(**document, position_ids=counted, max_new_tokens=2).tolist() == expected


@torch.no_grad()
def test_vectors_in_place_of_tokens(model, document):
    """Of text, padded and packed; images have no place in them."""
    ids = torch.randint(0, 800, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    starts = {"position_ids": torch.cat([torch.arange(15), torch.arange(25)]).expand(2, -1)}
    vectors = model.get_input_embeddings()(ids)
    for others in ({}, {"attention_mask": mask}, starts, {"labels": ids}):
        by_ids, by_vectors = model(ids, **others), model(inputs_embeds=vectors, **others)
        assert torch.equal(by_ids.logits, by_vectors.logits)
        assert by_ids.loss is None or torch.equal(by_ids.loss, by_vectors.loss)
    first = model(inputs_embeds=vectors[:, :30], use_cache=True)
    rest = model(ids[:, 30:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(rest, model(ids).logits[:, 30:], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="pass either input_ids or inputs_embeds"):
        model(ids, inputs_embeds=vectors)
    with pytest.raises(ValueError, match="pass input_ids with pixel_values"):
        model(inputs_embeds=vectors, **{key: document[key] for key in IMAGES})


@torch.no_grad()
def test_grids_as_other_processors_name_them(model, document):
    ids, pixel_values = document["input_ids"], document["pixel_values"]
    thw = torch.nn.functional.pad(document["grid_hw"], (1, 0), value=1)
    images = {"pixel_values": pixel_values, "image_grid_thw": thw}
    assert torch.equal(model(ids, **images).logits, model(**document).logits)
    greedy = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    assert torch.equal(model.generate(ids, **images, **greedy), model.generate(**document, **greedy))
    with pytest.raises(ValueError, match="pass one of them"):
        model(**document, image_grid_thw=thw)
    with pytest.raises(ValueError, match="images of 2 frames: NEO takes one"):
        model(ids, pixel_values, image_grid_thw=thw + 1)


@torch.no_grad()
def test_logits_to_keep(model, document):
    """So many of the last ones, or those at places; a loss is of as many."""
    labels = document["input_ids"].clone()
    labels[:, :60] = -100
    complete = model(**document, labels=labels)
    torch.testing.assert_close(model(**document, logits_to_keep=3).logits, complete.logits[:, -3:])
    some = model(**document, logits_to_keep=torch.tensor([0, 7])).logits
    torch.testing.assert_close(some, complete.logits[:, [0, 7]])
    kept = model(**document, labels=labels, logits_to_keep=102 - 59).loss
    torch.testing.assert_close(kept, complete.loss)
    with pytest.raises(ValueError, match="pass no labels"):
        model(**document, labels=labels, logits_to_keep=torch.tensor([0, 7]))


@torch.no_grad()
def test_an_output_as_a_tuple(model, document):
    assert torch.equal(model(**document, return_dict=False)[0], model(**document).logits)


@torch.no_grad()
def test_the_model_without_its_head(model, document):
    """For trainers that make logits and loss themselves."""
    states = model.base_model(**document, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.get_output_embeddings()(states), model(**document).logits)


@torch.no_grad()
def test_image_tokens_are_not_targets(model, golden):
    """Labels that are all of input_ids: the loss and the divisor are those of the text."""
    arguments = packed(load(golden, "inputs", "pack1"))
    ids, config = arguments["input_ids"], model.config
    names = {config.img_start_token_id, config.img_context_token_id, 898}  # 898 is </img>
    image = torch.tensor([[token in names for token in ids[0].tolist()]])
    labels = {"all": ids.clone(), "text": ids.masked_fill(image, -100)}
    assert image.sum() > 30
    loss = {key: model(**(arguments | {"labels": value})).loss for key, value in labels.items()}
    torch.testing.assert_close(loss["all"], loss["text"])
    count = {key: (value[:, 1:] != -100).sum() for key, value in labels.items()}
    for key, value in labels.items():
        summed = model(**(arguments | {"labels": value}), num_items_in_batch=2 * count[key]).loss
        torch.testing.assert_close(summed, loss["text"] / 2)
