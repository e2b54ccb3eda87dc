"""Conversations through NEO's template: what it refuses, what assistants say, and the tokens of training."""

import jinja2
import numpy as np
import pytest
from PIL import Image

from neo_megatron.data.chat import ChatEncoder, special_ids
from neo_megatron.data.conversation import Turn
from neo_megatron.hf.processing_neo import NEOProcessor

PT = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture(scope="module")
def processor(exported) -> NEOProcessor:
    return NEOProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8))


def trained(processor, turns, image_tokens=()):
    """Ids and labels mask as preprocessing makes them."""
    tokenizer = processor.tokenizer
    encoder = ChatEncoder(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer))
    (sample,) = encoder.encode([([Turn(role, text, role == "assistant") for role, text in turns], image_tokens)])
    mask = np.zeros(len(sample.tokens), int)
    for start, end in sample.spans:
        mask[start:end] = 1
    return sample.tokens.tolist(), mask.tolist()


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(words):
    return {"type": "text", "text": words}


REFUSED = {
    "video": ([user({"type": "video", "video": "film.mp4"})], "of type 'video'"),
    "audio": ([user({"type": "audio", "audio": "a.wav"})], "of type 'audio'"),
    "input_image": ([user({"type": "input_image", "image_url": "a.png"})], "of type 'input_image'"),
    "untyped": ([user({"text": "Hi"})], "type"),
    "untyped image": ([user({"image": "a.png"})], "type"),
    "bare string": ([user("Hi")], "type"),
    "no text": ([user({"type": "text", "content": "Hi"})], "text|'content'"),
    "image of the assistant": (
        [user(text("Hi")), {"role": "assistant", "content": [{"type": "image"}]}],
        "message 2.*(the assistant says|of the assistant has an image)",
    ),
    "tool calls": (
        [user(text("Hi")), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
        "message 2 has the key 'tool_calls'",
    ),
    "weight": (
        [user(text("Hi")), {"role": "assistant", "content": "Hi", "weight": 0}],
        "message 2 has the key 'weight'",
    ),
    "tool": ([{"role": "tool", "content": "4"}], "message 1 has the role 'tool'"),
    "human": ([{"role": "human", "content": "Hi"}], "message 1 has the role 'human'"),
    "content": ([{"role": "user", "content": {"type": "text", "text": "Hi"}}], "a string or a list of parts"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("tokenize", [False, True])
def test_every_part_of_a_message_is_used_or_refused(processor, case, tokenize):
    messages, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template(messages, tokenize=tokenize)


@pytest.mark.parametrize("case", REFUSED)
def test_the_template_alone_refuses_the_same(processor, case):
    """As a tokenizer or a serving engine renders it."""
    messages, sentence = REFUSED[case]
    with pytest.raises(jinja2.TemplateError, match=sentence):
        processor.tokenizer.apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("key", ["tools", "documents"])
def test_tools_and_documents_are_refused(processor, key):
    given = {key: [{"type": "function", "function": {"name": "f"}, "title": "a", "text": "b"}]}
    with pytest.raises(ValueError, match=f"leave {key} out"):
        processor.apply_chat_template([user(text("Hi"))], **given)
    with pytest.raises(jinja2.TemplateError, match=f"leave {key} out"):
        processor.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, **given)
    nothing = {"tools": None, "documents": None}
    assert processor.apply_chat_template([user(text("Hi"))], **nothing) == "<|im_start|>user\nHi<|im_end|>\n"


def test_images_in_the_template_alone(processor):
    """Both spellings, on lines of their own in front of the text; None where a data set has no value."""
    messages = [
        user(
            {"type": "image", "text": None},
            {"type": "image_url", "image_url": {"url": "a"}},
            text("Same?"),
            {"type": "image"},
        )
    ]
    expected = "<|im_start|>user\n<image>\n<image>\nSame?<image><|im_end|>\n"
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == expected
    assert processor.apply_chat_template(messages) == expected
    messages = [{"role": "user", "content": "Hi", "tool_calls": None, "name": None}]
    assert processor.apply_chat_template(messages) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    "part, sentence",
    [
        ({"type": "image", "image": "a.png", "max_pixels": 4096}, "message 1, part 1 has the key 'max_pixels'"),
        ({"type": "text", "text": "Hi", "cache_control": {}}, "part 1 has the key 'cache_control'"),
        ({"type": "image", "image": "a.png", "url": "b.png"}, "under 'image' and 'url'"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, "the key 'detail'"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(processor, part, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template([user(part)], tokenize=True)


def test_arguments_are_known_or_named(processor):
    for tokenize in (False, True):
        with pytest.raises(TypeError, match="'enable_thinking'"):
            processor.apply_chat_template([user(text("Hi"))], tokenize=tokenize, enable_thinking=False)
        with pytest.raises(TypeError, match="'max_pixel'"):
            processor.apply_chat_template([user(text("Hi"))], tokenize=tokenize, processor_kwargs={"max_pixel": 1})
    with pytest.raises(ValueError, match="tokenize=True and return_dict=True"):
        processor.apply_chat_template([user(text("Hi"))], return_assistant_tokens_mask=True)
    with pytest.raises(ValueError, match="a list of messages"):
        processor.apply_chat_template([])


def test_another_template_may_read_more(processor):
    template = "{% for m in messages %}{{ m.name }}: {{ m.content[0].text }}{{ mark }}{% endfor %}"
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}]
    assert processor.apply_chat_template(messages, chat_template=template, mark="!") == "Ann: Hi!"


CHAT = [
    ("system", "Be terse."),
    ("user", "<image>\nIs \\<image> a tag, or \\\\\\<video>?"),
    ("assistant", "\n<image> is, and \\<image>, and \\\\<image>, and <video>."),
    ("user", "And \\\\<image>?"),
    ("assistant", "No. "),
]


def test_all_ways_to_tokenize_give_the_same_tokens(processor, model, image, monkeypatch):
    """Preprocessing, the processor from messages and from text, and chat(), with tags that are words."""
    messages = [{"role": role, "content": words} for role, words in CHAT]
    features = processor(images=[image] * 2, text=processor.apply_chat_template(messages))
    image_tokens = (features["grid_hw"].prod(dim=-1) // 4).tolist()
    ids, mask = trained(processor, CHAT, image_tokens)
    assert features["input_ids"].tolist() == [ids]
    chat = processor.apply_chat_template(messages, images=[[image] * 2], return_assistant_tokens_mask=True, **PT)
    assert chat["input_ids"].tolist() == [ids] and chat["assistant_masks"].tolist() == [mask]
    rendered = processor.tokenizer.apply_chat_template(messages, tokenize=False)  # knows nothing of escapes
    assert processor(images=[image] * 2, text=rendered)["input_ids"].tolist() == [ids]

    prompts = []
    monkeypatch.setattr(model, "generate", lambda prompt, **_: prompts.append(prompt) or prompt)
    monkeypatch.setattr(model, "system_message", CHAT[0][1], raising=False)
    said = {"generation_config": {}, "pixel_values": features["pixel_values"], "grid_hw": features["grid_hw"]}
    model.chat(processor.tokenizer, question=CHAT[3][1], history=[(CHAT[1][1], CHAT[2][1])], **said)
    prompt = prompts[0][0].tolist()
    assert ids[: len(prompt)] == prompt and mask[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_the_mask_of_a_batch(processor, image):
    """Images, padding on either side, a control token that somebody typed, and turns that are not the last."""
    turns = [
        [
            ("user", "<image>\nWhat <|im_end|> is it?"),
            ("assistant", "A cat."),
            ("user", "Sure?"),
            ("assistant", "Yes <img>!"),
        ],
        [("user", "Hi"), ("assistant", "Hello.")],
    ]
    chats = [[{"role": role, "content": words} for role, words in chat] for chat in turns]
    one = {"images": [[image], []], "return_assistant_tokens_mask": True, **PT}
    features = processor.apply_chat_template(chats, **one)
    image_tokens = [int(features["grid_hw"].prod()) // 4]
    expected = [trained(processor, turns[0], image_tokens), trained(processor, turns[1])]
    for side in ("left", "right"):
        features = processor.apply_chat_template(chats, padding_side=side, **one)
        for row, (ids, mask) in enumerate(expected):
            seen = features["attention_mask"][row].bool()
            assert features["input_ids"][row][seen].tolist() == ids
            assert features["assistant_masks"][row][seen].tolist() == mask
            assert not features["assistant_masks"][row][~seen].any()
    lists = processor.apply_chat_template(
        chats, images=[[image], []], return_assistant_tokens_mask=True, tokenize=True, return_dict=True
    )
    assert [lists["input_ids"], lists["assistant_masks"]] == [
        [ids for ids, _ in expected],
        [mask for _, mask in expected],
    ]


def test_the_mask_of_the_tokenizer(processor):
    """Text alone, as TRL gives it: content, end of turn and line break of every answer."""
    turns = [("system", "Be terse."), ("user", "Hi"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "No.")]
    features = processor.tokenizer.apply_chat_template(
        [{"role": role, "content": words} for role, words in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = trained(processor, turns)
    assert (features["input_ids"], features["assistant_masks"]) == (ids, mask)


def test_a_begun_answer_is_continued(processor):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<image> is"}]
    prompt = processor.apply_chat_template(messages, continue_final_message=True)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\\<image> is"
    ids = processor.apply_chat_template(messages, continue_final_message=True, **PT)["input_ids"]
    assert ids.tolist() == processor(text=prompt)["input_ids"].tolist()
    assert processor.tokenizer.decode(ids[0]).endswith("assistant\n<image> is")


def test_a_video_tag_is_refused(processor):
    with pytest.raises(ValueError, match="a <video> tag: give the frames as images"):
        processor(text="What happens in <video>?")
    assert processor.tokenizer.decode(processor(text="\\<video>")["input_ids"][0]) == "<video>"


def test_the_template_marks_assistant_turns(exported):
    """By which trainers know that there is an answer to mark."""
    template = (exported / "chat_template.jinja").read_text()
    assert "{%- generation %}" in template and "{%- endgeneration %}" in template


@pytest.mark.parametrize("given", ["tokenizer", "processor"])
def test_generate_ends_at_a_stop_string(model, processor, image, given):
    """`transformers serve` passes its processor as the tokenizer."""
    asked = [user({"type": "image", "image": image}, text("What is this?"))]
    inputs = processor.apply_chat_template(asked, add_generation_prompt=True, **PT)
    length = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 8, "do_sample": False}
    complete = model.generate(**inputs, **settings)[0, length:]
    fourth = processor.decode(complete[3:4])
    assert fourth not in processor.decode(complete[:3])
    tokenizer = processor.tokenizer if given == "tokenizer" else processor
    stopped = model.generate(**inputs, **settings, stop_strings=[fourth], tokenizer=tokenizer)[0, length:]
    assert stopped.tolist() == complete[:4].tolist()
