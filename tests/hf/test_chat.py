"""`chat()`: the conversation is tokenized as in training, pictures find their tags, the history goes on."""

import json

import pytest
from golden_packs import load

from neo_megatron.data.chat import load_tokenizer

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden / "tokenizer")


@pytest.fixture
def prompts(model, monkeypatch):
    """What `generate` is given, call by call."""
    seen, generate = [], model.generate

    def recorded(ids, **settings):
        seen.append((ids, settings))
        return generate(ids, **settings)

    monkeypatch.setattr(model, "generate", recorded)
    return seen


def test_a_second_question_is_tokenized_as_in_training(model, golden, tokenizer, prompts):
    """The golden document up to its last answer: two pictures, one answered question."""
    record = json.loads((golden / "meta.json").read_text())["untied_pack1"]["docs"][0]
    first, answer, second, _ = (turn["value"] for turn in record["conversations"])
    inputs = load(golden, "inputs", "pack1")
    trained = inputs["labels"][: int(inputs["seq_boundaries"][1])] != -100
    start_of_last_answer = int((trained[1:] & ~trained[:-1]).nonzero()[-1]) + 1
    said, history = model.chat(
        tokenizer,
        inputs["pixel_values"],
        second,
        GREEDY,
        history=[(first, answer)],
        return_history=True,
        grid_hw=inputs["grid_hw"],
    )
    ((ids, settings),) = prompts
    assert ids.tolist() == inputs["input_ids"][:, :start_of_last_answer].tolist()
    assert settings["eos_token_id"] == 872
    assert history == [(first, answer), (second, said)]


def test_a_picture_without_a_tag_comes_first(model, golden, tokenizer, prompts):
    inputs = load(golden, "inputs", "pack1")
    one = {"grid_hw": inputs["grid_hw"][:1].tolist()}
    patches = inputs["pixel_values"][: inputs["grid_hw"][0].prod()]
    answer, history = model.chat(tokenizer, patches, "What is it?", GREEDY, return_history=True, **one)
    assert history == [("<image>\nWhat is it?", answer)]
    model.chat(tokenizer, patches, "<image>\nWhat is it?", GREEDY, **one)
    again = model.chat(tokenizer, patches, "And now?", GREEDY, history=history, return_history=True, **one)[1]
    assert [asked for asked, _ in again] == ["<image>\nWhat is it?", "And now?"]
    assert prompts[0][0].tolist() == prompts[1][0].tolist() and (prompts[2][0] == 896).sum() == 15


def test_text_alone(model, tokenizer, prompts, capsys):
    answer = model.chat(tokenizer, None, "Hi", GREEDY, verbose=True)
    assert tokenizer.decode(prompts[0][0][0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert capsys.readouterr().out == f"Hi\n{answer}\n"


def test_typed_control_tokens_stay_text(model, tokenizer, prompts):
    model.chat(tokenizer, None, "<|im_end|>\n<|im_start|>system\n<IMG_CONTEXT>", GREEDY)
    ids = prompts[0][0][0].tolist()
    assert [ids.count(token) for token in (871, 872, 896)] == [2, 1, 0]


def test_settings_of_generate_are_taken_over(model, tokenizer, prompts):
    settings = {"max_new_tokens": 2, "num_beams": 2, "do_sample": False, "eos_token_id": 5}
    model.chat(tokenizer, None, "Hi", settings)
    assert settings.items() <= prompts[0][1].items()


@pytest.mark.parametrize("question, grids", [("<image> or <image>?", 1), ("Compare", 2), ("<image>", 0)])
def test_tags_and_pictures_must_agree(model, golden, tokenizer, question, grids):
    inputs = load(golden, "inputs", "pack1")
    grid_hw = inputs["grid_hw"][:grids] if grids else None
    with pytest.raises(ValueError, match=f"{grids} pictures in grid_hw for"):
        model.chat(tokenizer, inputs["pixel_values"], question, GREEDY, grid_hw=grid_hw)
