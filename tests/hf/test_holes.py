"""Padding anywhere in a row: the other tokens get what they get in a row without it."""

import pytest
import torch
from support.golden_packs import flattened, load

PAD = 870
IMAGES = ("pixel_values", "grid_hw")


def with_hole(ids, place, width, token=PAD):
    """The row `[1, L]` with masked tokens in front of ``place``, its mask, and where its own tokens are."""
    hole = ids.new_full((1, width), token)
    kept = torch.ones(1, ids.shape[1] + width, dtype=torch.bool)
    kept[:, place : place + width] = False
    return torch.cat([ids[:, :place], hole, ids[:, place:]], dim=1), kept.long(), kept[0]


def positions(model, *arguments, **named):
    """The positions t, h and w that the decoder gets."""
    seen = []
    hook = model.language_model.get_decoder().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    logits = model(*arguments, **named).logits
    hook.remove()
    return seen[0], logits


@pytest.mark.parametrize("place", [0, 4, 10, 11, 17, 26, 40, 41, 101, 102])
@pytest.mark.parametrize("token", [PAD, 5])
@torch.no_grad()
def test_a_row_with_a_hole(model, document, place, token):
    """Between words, between an `<img>` and its image, in an image, in front and at the end of the row."""
    ids, images = document["input_ids"], {key: document[key] for key in IMAGES}
    thw, logits = positions(model, ids, **images)
    holed, mask, kept = with_hole(ids, place, 7, token)
    thw_holed, logits_holed = positions(model, holed, attention_mask=mask, **images)
    assert thw_holed[:, kept].tolist() == thw.tolist()
    torch.testing.assert_close(logits_holed[:, kept], logits, atol=1e-4, rtol=0)
    prepared = model.prepare_inputs_for_generation(holed, attention_mask=mask, **images)
    assert prepared["positions_thw"][:, kept].tolist() == thw.tolist()


@torch.no_grad()
def test_masked_words_are_ignored(model, document):
    """As a conversation whose older turns are hidden: the row without them, though they are words."""
    ids, images = document["input_ids"], {key: document[key] for key in IMAGES}
    mask = torch.ones_like(ids)
    mask[:, 60:75] = 0
    kept = mask[0].bool()
    logits = model(ids, attention_mask=mask, **images).logits[:, kept]
    torch.testing.assert_close(logits, model(ids[:, kept], **images).logits, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_masked_image_is_ignored(model, document):
    """It is still one of `pixel_values`."""
    ids, grids = document["input_ids"], document["grid_hw"]
    image = (ids[0] == model.config.image_token_id) | (ids[0] == model.config.img_start_token_id)
    second = int((ids[0] == model.config.img_start_token_id).nonzero()[1])
    mask = torch.ones_like(ids)
    mask[:, second:] = ~image[second:]
    kept = mask[0].bool()
    logits = model(**document, attention_mask=mask).logits[:, kept]
    patches = document["pixel_values"].split(grids.prod(dim=-1).tolist())
    torch.testing.assert_close(logits, model(ids[:, kept], patches[0], grids[:1]).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("first, last", [(10, 11), (9, 10), (12, 20), (15, 60)])
def test_a_part_of_an_image_is_not_masked(model, document, first, last):
    ids, mask = document["input_ids"], torch.ones_like(document["input_ids"])
    assert ids[0, 9] == model.config.img_start_token_id
    mask[:, first:last] = 0
    for use in (model, model.prepare_inputs_for_generation):
        with pytest.raises(ValueError, match="hides a part of an image in row 0: hide its <img> and all of its"):
            use(**document, attention_mask=mask)


@torch.no_grad()
def test_a_conversation_in_turns(model, document):
    """Each turn of a batch is padded on the right and follows the cache: rows of other lengths, holes between turns."""
    ids, images = document["input_ids"], {key: document[key] for key in IMAGES}
    other = torch.randint(0, 800, (1, 70), generator=torch.Generator().manual_seed(0))
    cut = int((ids[0] == model.config.img_start_token_id).nonzero()[1]) + 20  # after both images
    turns = [(ids[:, :cut], other[:, :5]), (ids[:, cut : cut + 3], other[:, 5:40]), (ids[:, cut + 3 :], other[:, 40:])]
    cache, mask, logits = None, torch.ones(2, 0, dtype=torch.long), [[], []]
    for number, turn in enumerate(turns):
        width = max(part.shape[1] for part in turn)
        padded = torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=PAD) for part in turn])
        new = torch.cat([(torch.arange(width) < part.shape[1]).long()[None] for part in turn])
        mask = torch.cat([mask, new], dim=1)
        out = model(
            padded, attention_mask=mask, past_key_values=cache, use_cache=True, **(images if not number else {})
        )
        cache = out.past_key_values
        for row, part in enumerate(turn):
            logits[row].append(out.logits[row, : part.shape[1]])
    for row, complete in enumerate((model(ids, **images).logits, model(other).logits)):
        torch.testing.assert_close(torch.cat(logits[row]), complete[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_generation_after_a_hole(model, document):
    ids, images = document["input_ids"], {key: document[key] for key in IMAGES}
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": PAD, "eos_token_id": None}
    expected = model.generate(ids, **images, **settings)[:, ids.shape[1] :].tolist()
    holed, mask, _ = with_hole(ids, 50, 9)
    for beams in (1, 3):
        rows = {"attention_mask": mask, "num_beams": beams, **images}
        alone = model.generate(ids, num_beams=beams, **images, **settings)[:, ids.shape[1] :].tolist()
        assert model.generate(holed, **rows, **settings)[:, holed.shape[1] :].tolist() == alone
        assert beams > 1 or alone == expected


@torch.no_grad()
def test_packs_with_a_hole(model, golden):
    """Documents are counted by the tokens that are there, whatever position_ids say of padding."""
    pack = flattened(load(golden, "inputs", "pack1"))
    ids, images = pack["input_ids"], {key: pack[key] for key in IMAGES}
    expected = model(**pack).logits
    start = int((pack["position_ids"][0] == 0).nonzero()[1])
    for place in (start - 3, start, start + 3):
        holed, mask, kept = with_hole(ids, place, 5)
        counted = torch.zeros_like(holed)
        counted[:, kept] = pack["position_ids"]
        logits = model(holed, attention_mask=mask, position_ids=counted, **images).logits[:, kept]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
