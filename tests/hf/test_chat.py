"""`chat()`: the conversation is tokenized as in training, images find their tags, the history goes on."""

import json

import pytest
import torch
from PIL import Image
from support.golden_packs import load
from support.paths import GOLDEN
from transformers import (
    LogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TextStreamer,
)

from neo_megatron.data.chat import load_tokenizer
from neo_megatron.hf.image_processing_neo import NEOImageProcessor

GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def tokenizer(golden):
    return load_tokenizer(golden / "tokenizer")


@pytest.fixture
def prompts(model, monkeypatch):
    """The arguments of each call of `generate`."""
    seen, generate = [], model.generate

    def recorded(ids, **settings):
        seen.append((ids, settings))
        return generate(ids, **settings)

    monkeypatch.setattr(model, "generate", recorded)
    return seen


def test_a_second_question_is_tokenized_as_in_training(model, golden, tokenizer, prompts):
    """The golden document up to its last answer: two images, one answered question."""
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


def test_an_image_without_a_tag_comes_first(model, golden, tokenizer, prompts):
    inputs = load(golden, "inputs", "pack1")
    one = {"grid_hw": inputs["grid_hw"][:1].tolist()}
    patches = inputs["pixel_values"][: inputs["grid_hw"][0].prod()]
    answer, history = model.chat(tokenizer, patches, "What is it?", GREEDY, return_history=True, **one)
    assert history == [("<image>\nWhat is it?", answer)]
    model.chat(tokenizer, patches, "<image>\nWhat is it?", GREEDY, **one)
    again = model.chat(tokenizer, patches, "And now?", GREEDY, history=history, return_history=True, **one)[1]
    assert [asked for asked, _ in again] == ["<image>\nWhat is it?", "And now?"]
    assert prompts[0][0].tolist() == prompts[1][0].tolist() and (prompts[2][0] == 896).sum() == 15


PUBLISHED = json.loads((GOLDEN / "u1" / "generate.json").read_text())["dense"]


@pytest.mark.parametrize("case", PUBLISHED, ids=[case["question"] for case in PUBLISHED])
def test_prompts_are_those_of_the_published_unify(model, golden, tokenizer, prompts, case):
    """Nothing of thinking is prefilled, and answers of the history have no think block."""
    processor = NEOImageProcessor(min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])
    images = processor([Image.open(golden / name) for name in case["images"]])
    history = [tuple(pair) for pair in case["history"] or []]
    model.chat(tokenizer, question=case["question"], generation_config=GREEDY, history=history, **images)
    assert prompts[0][0][0].tolist() == case["prompt_ids"]
    assert tokenizer.decode(prompts[0][0][0]) == case["prompt"]


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
def test_tags_and_images_must_agree(model, golden, tokenizer, question, grids):
    inputs = load(golden, "inputs", "pack1")
    grid_hw = inputs["grid_hw"][:grids] if grids else None
    with pytest.raises(ValueError, match=f"{grids} images in grid_hw for"):
        model.chat(tokenizer, inputs["pixel_values"], question, GREEDY, grid_hw=grid_hw)


QUESTION = "the the the the cat and the dog are in the red square"
TERSE = "<|im_start|>system\nBe terse.<|im_end|>\n"


@pytest.fixture
def terse(model, monkeypatch):
    """A system message as evaluation kits set it."""
    monkeypatch.setattr(model, "system_message", "Be terse.", raising=False)


def greedy(model, ids, tokens, processor=lambda ids, scores: scores):
    """The answer's ids: each from a forward of all before it, scores processed with the answer's ids alone."""
    answer = ids[:, :0]
    for _ in range(tokens):
        with torch.no_grad():
            logits = model(torch.cat([ids, answer], dim=1)).logits[:, -1].float()
        answer = torch.cat([answer, processor(answer, logits).argmax(dim=-1)[:, None]], dim=1)
    return answer[0].tolist()


def said_ids(model, tokenizer, monkeypatch, **settings):
    """Prompt, and ids of the answer to a question."""
    made, generate = [], model.generate
    monkeypatch.setattr(
        model, "generate", lambda *args, **kw: made.append((args[0], generate(*args, **kw))) or made[-1][1]
    )
    model.chat(tokenizer, None, QUESTION, {"do_sample": False, "eos_token_id": 5, **settings})
    ((prompt, ids),) = made
    return prompt, ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("penalty", [3.0, 0.3])  # the latter prefers what was said already
def test_a_repetition_penalty_counts_the_answer_alone(model, tokenizer, monkeypatch, penalty):
    """As in the published code, which gives `generate` no ids of the prompt."""
    prompt, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=12, repetition_penalty=penalty)
    assert said == greedy(model, prompt, 12, RepetitionPenaltyLogitsProcessor(penalty))


def test_a_repetition_penalty_of_generate_counts_the_prompt_too(model, tokenizer, monkeypatch):
    settings = {"max_new_tokens": 12, "repetition_penalty": 0.3}
    prompt, said = said_ids(model, tokenizer, monkeypatch, **settings)
    monkeypatch.undo()
    counted = model.generate(prompt, do_sample=False, eos_token_id=5, **settings)[0, prompt.shape[1] :].tolist()
    assert counted != said and counted[0] in prompt[0]


def test_a_repetition_penalty_of_the_generation_config_too(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 3.0)
    prompt, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=12)
    assert said == greedy(model, prompt, 12, RepetitionPenaltyLogitsProcessor(3.0))
    monkeypatch.undo()
    prompt, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=12, repetition_penalty=1.0)
    assert said == greedy(model, prompt, 12)


def test_token_penalties_count_only_the_answer(model, tokenizer, monkeypatch):
    prompt, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=12, no_repeat_ngram_size=2)
    assert said == greedy(model, prompt, 12, NoRepeatNGramLogitsProcessor(2))
    monkeypatch.undo()
    # Its first token ends the prompt, so with the prompt in view the answer's own first token would be forbidden.
    words = [[int(prompt[0, -1]), greedy(model, prompt, 1)[0]]]
    _, free = said_ids(model, tokenizer, monkeypatch, max_new_tokens=6, bad_words_ids=words)
    assert free == greedy(model, prompt, 6, NoBadWordsLogitsProcessor(words, torch.tensor([5])))
    assert free[0] == words[0][1]


def test_own_processors_criteria_and_streamers_see_the_answer(model, tokenizer, monkeypatch, capsys):
    seen = {"processor": [], "criterion": [], "allowed": []}

    class Processor(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen["processor"].append(input_ids.shape[1])
            return scores

    class Criterion(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            seen["criterion"].append(input_ids.shape[1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def allowed(row, ids):
        seen["allowed"].append(len(ids))
        return range(1024)

    own = {
        "logits_processor": [Processor()],
        "stopping_criteria": [Criterion()],
        "prefix_allowed_tokens_fn": allowed,
        "streamer": TextStreamer(tokenizer),
    }
    _, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=3, **own)
    assert seen == {"processor": [0, 1, 2], "criterion": [1, 2, 3], "allowed": [0, 1, 2]}
    assert capsys.readouterr().out.strip() == tokenizer.decode(said).strip()


def test_a_stop_string_stands_in_the_answer(model, tokenizer, monkeypatch):
    """The prompt ends with a line break, which is not part of what the model says."""
    prompt, said = said_ids(model, tokenizer, monkeypatch, max_new_tokens=6)
    first, rest = tokenizer.decode(said[:1]), tokenizer.decode(said[1:3])
    monkeypatch.undo()
    _, stopped = said_ids(model, tokenizer, monkeypatch, max_new_tokens=6, stop_strings=["\n" + first, rest])
    assert 1 < len(stopped) <= 3 and stopped == said[: len(stopped)]


def test_a_system_message_is_the_first_turn(model, tokenizer, prompts, terse):
    answer, history = model.chat(tokenizer, None, "Hi", GREEDY, return_history=True)
    model.chat(tokenizer, None, "And?", GREEDY, history=history)
    texts = [tokenizer.decode(ids[0]) for ids, _ in prompts]
    assert texts[0] == f"{TERSE}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert texts[1].startswith(texts[0]) and texts[1].count("system") == 1
    assert history == [("Hi", answer)]


def test_no_system_message_by_default(model, tokenizer, prompts):
    model.chat(tokenizer, None, "Hi", GREEDY)
    assert "system" not in tokenizer.decode(prompts[0][0][0])


def test_messages_as_history(model, tokenizer, prompts, terse):
    """A system turn of the conversation stands in place of the message of the model."""
    messages = [
        {"role": "system", "content": "Be long."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    answer, history = model.chat(tokenizer, None, "And?", GREEDY, history=messages, return_history=True)
    expected = tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "And?"}],
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n\n",
        tokenize=False,
    )
    assert tokenizer.decode(prompts[0][0][0]) == expected
    assert history == [*messages, ("And?", answer)]


@pytest.mark.parametrize(
    "history",
    [
        [("Hi",)],
        ["Hi"],
        [("Hi", None)],
        [{"role": "tool", "content": "4"}],
        [{"role": "user", "content": "Hi", "tool_calls": []}],
        [("Hi", "Hello"), {"role": "system", "content": "Be terse."}],
    ],
)
def test_a_history_of_another_form_is_refused(model, tokenizer, history):
    with pytest.raises(ValueError, match=r"history\[0\] must|in the history must be its first"):
        model.chat(tokenizer, None, "And?", GREEDY, history=history)


def test_tags_after_a_backslash_and_in_answers_are_text(model, golden, tokenizer, prompts):
    inputs = load(golden, "inputs", "pack1")
    one = {"grid_hw": inputs["grid_hw"][:1], "pixel_values": inputs["pixel_values"][: inputs["grid_hw"][0].prod()]}
    history = [("What does \\<image> mean?", "<image> and \\<image> and <video> are tags.")]
    model.chat(tokenizer, question="And in <image>, \\\\\\<video>?", generation_config=GREEDY, history=history, **one)
    ids = prompts[0][0][0]
    image_tokens = int(inputs["grid_hw"][0].prod()) // 4
    assert (ids == 896).sum() == image_tokens
    assert tokenizer.decode(ids).replace("<IMG_CONTEXT>" * image_tokens, "#") == (
        "<|im_start|>user\nWhat does <image> mean?<|im_end|>\n"
        "<|im_start|>assistant\n<image> and <image> and <video> are tags.<|im_end|>\n"
        "<|im_start|>user\nAnd in <img>#</img>, \\<video>?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_escaped_tag_leaves_the_image_in_front(model, golden, tokenizer):
    inputs = load(golden, "inputs", "pack1")
    one = {"grid_hw": inputs["grid_hw"][:1], "pixel_values": inputs["pixel_values"][: inputs["grid_hw"][0].prod()]}
    settings = {"tokenizer": tokenizer, "generation_config": GREEDY, "return_history": True, **one}
    _, history = model.chat(question="Is \\<image> a tag?", **settings)
    assert history[0][0] == "<image>\nIs \\<image> a tag?"


def test_a_video_tag_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"a <video> tag: give the frames as images"):
        model.chat(tokenizer, None, "What happens in <video>?", GREEDY)
