"""Records of the forms of public data sets, and exactly the turns and files that they become."""

from pathlib import Path
from typing import Any

import jinja2
import pytest

from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.prepare.record_keys import ignored_keys
from neo_megatron.data.prepare.records import check_sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.fields import Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.table import SCHEMAS, published_form
from neo_megatron.errors import Reason, RejectedSample

TEMPLATE = Path(__file__).parents[4] / "neo_megatron" / "hf" / "chat_template.jinja"

LLAVA = {  # LLaVA-Instruct-150K
    "id": "000000033471",
    "image": "000000033471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat are the colors of the bus in the image?"},
        {"from": "gpt", "value": "The bus in the image is white and red."},
    ],
}
SHAREGPT4V = {  # ShareGPT4V: the tag stands after the question
    "id": "000000000009",
    "image": "coco/train2017/000000000009.jpg",
    "conversations": [
        {"from": "human", "value": "What do you see happening in this image?\n<image>"},
        {"from": "gpt", "value": "In the center of the image, a vibrant blue lunch tray holds four containers."},
    ],
}
CAULDRON = {  # HuggingFaceM4/the_cauldron, once its images are files
    "images": ["a.png", "b.png"],
    "texts": [
        {"user": "What differs?", "assistant": "The <image> tag.", "source": "nlvr2"},
        {"user": "Sure?", "assistant": "Yes.", "source": "nlvr2"},
    ],
}
MS_SWIFT = {  # ms-swift: one <image> for each of the images
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image><image>What differs?"},
        {"role": "assistant", "content": "The colour.", "loss": False},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ],
    "images": ["a.png", "b.png"],
}
LLAMA_FACTORY = {  # LLaMA-Factory's mllm_demo.json
    "messages": [
        {"content": "<image>Who are they?", "role": "user"},
        {"content": "They're Kane and Gretzka.", "role": "assistant"},
    ],
    "images": ["mllm_demo_data/1.jpg"],
}
OPENAI = {  # the chat form of OpenAI's fine-tuning
    "messages": [
        {"role": "system", "content": "You read <image> tags."},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
                {"type": "text", "text": "What is <image> in RSS, and here: "},
                {"type": "image_url", "image_url": {"url": "b.png"}},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": "An <image> element."},
    ]
}
HUGGING_FACE = {  # TRL and transformers: parts without a file, images of the record; Arrow fills up the keys
    "messages": [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
    "images": ["a.png"],
}
OLD_SWIFT = {"query": "<image>Why?", "response": "So.", "history": [["Hi", "Hello!"]], "images": ["a.png"]}
ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "You add."}
LAION = {  # img2dataset's output: one member per suffix, and its .json
    "__key__": "000000000",
    "jpg": "000000000.jpg",
    "txt": "a photo of <image> tags",
    "caption": "a photo of <image> tags",
    "url": "https://example.org/a.jpg",
    "key": "000000000",
    "status": "success",
    "error_message": None,
    "width": 256,
    "height": 256,
    "original_width": 512,
    "original_height": 512,
    "exif": "{}",
    "sha256": "0" * 64,
    "similarity": 0.31,
}
OBELICS = {  # HuggingFaceM4/OBELICS, with files for addresses; OmniCorpus-CC has the same lists
    "images": ["a.png", None, None, "b.png", None],
    "metadata": '[{"document_url": "https://example.org"}]',
    "general_metadata": '{"url": "https://example.org"}',
    "texts": [None, "A title\n\nand a paragraph.", "More.", None, "The end."],
}
MMC4 = {
    "image_info": [
        {
            "face_detections": None,
            "image_name": "b9040a0dbb22.jpg",
            "matched_sim": 0.27694183588027954,
            "matched_text_index": 1,
            "raw_url": "http://example.org/1.jpg",
        },
        {"face_detections": None, "image_name": "db1c21bc8474.jpg", "matched_sim": 0.32, "matched_text_index": 0},
    ],
    "similarity_matrix": [[0.24, 0.27], [0.32, 0.21]],
    "text_list": ["When you lock the door.", "Our services are fast."],
    "url": "http://example.org/",
    "could_have_url_duplicate": 0,
}
PARTS = {
    "content": [{"type": "text", "text": "See "}, {"type": "image", "image": "a.png"}, {"type": "text", "text": "!"}]
}
C4 = {"text": "Beginners BBQ Class\n<image> is text", "timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org"}

FORMS: dict[str, tuple[str, dict, list[tuple[str, str, bool]], list[str], list[str]]] = {
    # name: schema, record, (role, text, trained) of the turns, images, ignored keys
    "LLaVA-Instruct": (
        "neo",
        LLAVA,
        [
            ("user", "<image>\nWhat are the colors of the bus in the image?", False),
            ("assistant", "The bus in the image is white and red.", True),
        ],
        ["000000033471.jpg"],
        [],
    ),
    "ShareGPT4V": (
        "neo",
        SHAREGPT4V,
        [
            ("user", "What do you see happening in this image?\n<image>", False),
            (
                "assistant",
                "In the center of the image, a vibrant blue lunch tray holds four containers.",
                True,
            ),
        ],
        ["coco/train2017/000000000009.jpg"],
        [],
    ),
    "the_cauldron": (
        "messages",
        CAULDRON,
        [
            ("user", "<image>\n<image>\nWhat differs?", False),
            ("assistant", "The \\<image> tag.", True),
            ("user", "Sure?", False),
            ("assistant", "Yes.", True),
        ],
        ["a.png", "b.png"],
        ["conversations[].source"],
    ),
    "ms-swift": (
        "messages",
        MS_SWIFT,
        [
            ("system", "Be brief.", False),
            ("user", "<image><image>What differs?", False),
            ("assistant", "The colour.", False),
            ("user", "Sure?", False),
            ("assistant", "Yes.", True),
        ],
        ["a.png", "b.png"],
        [],
    ),
    "LLaMA-Factory": (
        "messages",
        LLAMA_FACTORY,
        [("user", "<image>Who are they?", False), ("assistant", "They're Kane and Gretzka.", True)],
        ["mllm_demo_data/1.jpg"],
        [],
    ),
    "OpenAI": (
        "messages",
        OPENAI,
        [
            ("system", "You read \\<image> tags.", False),
            ("user", "<image>\nWhat is \\<image> in RSS, and here: <image>?", False),
            ("assistant", "An \\<image> element.", True),
        ],
        ["a.png", "b.png"],
        ["conversations[].content[].detail"],
    ),
    "Hugging Face": (
        "messages",
        HUGGING_FACE,
        [("user", "<image>\nWhat?", False), ("assistant", "A cat.", True)],
        ["a.png"],
        [],
    ),
    "ms-swift before messages": (
        "messages",
        OLD_SWIFT,
        [
            ("user", "Hi", False),
            ("assistant", "Hello!", True),
            ("user", "<image>Why?", False),
            ("assistant", "So.", True),
        ],
        ["a.png"],
        [],
    ),
    "Alpaca": (
        "messages",
        ALPACA,
        [("system", "You add.", False), ("user", "Add.\n1 and 2", False), ("assistant", "3", True)],
        [],
        [],
    ),
    "LAION": (
        "caption",
        LAION,
        [("document", "<image>\na photo of \\<image> tags", True)],
        ["000000000.jpg"],
        ["similarity"],
    ),
    "OBELICS": (
        "interleaved",
        OBELICS,
        [("document", "<image>\nA title\n\nand a paragraph.\n\nMore.\n<image>\nThe end.", True)],
        ["a.png", "b.png"],
        [],
    ),
    "MMC4": (
        "interleaved",
        MMC4,
        [("document", "<image>\nWhen you lock the door.\n<image>\nOur services are fast.", True)],
        ["db1c21bc8474.jpg", "b9040a0dbb22.jpg"],
        [],
    ),
    "typed parts": ("interleaved", PARTS, [("document", "See <image>!", True)], ["a.png"], []),
    "C4": (
        "text",
        C4,
        [("document", "Beginners BBQ Class\n\\<image> is text", True)],
        [],
        ["timestamp", "url"],
    ),
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "train.json").write_text("[{}]")
    return Source("train", str(tmp_path / "train.json"))


def published(schema: str, record: dict[str, Any], **options: Any) -> dict[str, Any]:
    return published_form(record, SchemaOptions(schema, **options), Origin())


def turns_of(schema: str, record: dict[str, Any], source: Source, **options: Any) -> list[tuple[str, str, bool]]:
    checked = check_sample(published(schema, record, **options), source)
    return [(turn.role, turn.text, turn.trained) for turn in checked.turns]


def rejected(schema: str, record: dict[str, Any], source: Source, **options: Any) -> RejectedSample:
    with pytest.raises(RejectedSample) as raised:
        turns_of(schema, record, source, **options)
    return raised.value


@pytest.mark.parametrize("name", FORMS)
def test_a_record_becomes_exactly_these_turns_and_files(source, name):
    schema, record, turns, images, ignored = FORMS[name]
    form = published(schema, record)
    assert turns_of(schema, record, source) == turns
    directory = Path(source.annotations).parent
    assert [str(Path(path).relative_to(directory)) for path in check_sample(form, source).images] == images
    assert ignored_keys(form) == ignored


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_claimed_by_its_schema_alone(name):
    schema, record, *_ = FORMS[name]
    assert [other for other, entry in SCHEMAS.items() if entry.claims(record)] == [schema]


def test_typed_parts_are_laid_out_as_the_chat_template_of_exports_does(source, tokenizer):
    image, text = {"type": "image"}, {"type": "text", "text": " then "}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, image, text, image, text]},
        {"role": "assistant", "content": [text]},
        {"role": "user", "content": [text, image]},
        {"role": "assistant", "content": "Yes."},
    ]
    neo = load_tokenizer(tokenizer)
    files = ["a.png", "b.png", "c.png", "d.png"]
    checked = check_sample(published("messages", {"messages": messages, "images": files}), source)
    (encoded,) = ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo)).encode([(checked.turns, [2] * 4)])
    template = TEMPLATE.read_text().replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    rendered = jinja2.Template(template).render(messages=messages, raise_exception=pytest.fail)
    assert neo.decode(encoded.tokens) == rendered.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 2}</img>")


def test_a_caption_answers_a_prompt_that_depends_on_its_place_alone(source):
    prompts = tuple(f"Prompt {number}" for number in range(5))
    options = SchemaOptions("caption", prompts=prompts)
    record = {"image": "a.png", "caption": "A <image>"}

    def drawn(*place) -> list[str]:
        forms = [published_form(record, options, Origin(*place, number)) for number in range(200)]
        return [form["conversations"][0]["value"] for form in forms]

    first = drawn(1, "web", "0.tar")
    assert set(first) == {f"<image>\n{prompt}" for prompt in prompts} and first == drawn(1, "web", "0.tar")
    assert all(drawn(*other) != first for other in ((2, "web", "0.tar"), (1, "net", "0.tar"), (1, "web", "1.tar")))
    assert turns_of("caption", record, source, prompts=prompts)[1] == ("assistant", "A \\<image>", True)


def test_columns_give_other_keys_to_fields_and_leave_the_usual_ones_to_be_named(source):
    record = {"image": "a.png", "text": "alt", "caption_long": "A cat on a mat."}
    columns = (("text", "caption_long"),)
    assert turns_of("caption", record, source, columns=columns) == [("document", "<image>\nA cat on a mat.", True)]
    assert ignored_keys(published("caption", record, columns=columns)) == ["text"]
    record = {"dialog": LLAVA["conversations"], "image": "a.png"}
    assert len(turns_of("neo", record, source, columns=(("conversations", "dialog"),))) == 2
    chat = {"conversations": MS_SWIFT["messages"], "images": MS_SWIFT["images"]}
    assert turns_of("messages", chat, source, columns=(("messages", "conversations"),)) == FORMS["ms-swift"][2]
    named = {"chat": [{"speaker": "user", "say": "Hi"}, {"speaker": "assistant", "say": "Hello"}]}
    columns = (("messages", "chat"), ("role", "speaker"), ("content", "say"))
    assert turns_of("messages", named, source, columns=columns) == [("user", "Hi", False), ("assistant", "Hello", True)]


def test_files_under_a_key_that_columns_pass_over_are_not_dropped(source):
    record = {"image": "small.png", "image_hr": "large.png", "text": "A cat."}
    error = rejected("caption", record, source, columns=(("image", "image_hr"),))
    assert error.reason == Reason.UNSUPPORTED_KEY and "'image' is not read" in error.sentence


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": r"\[IMG] is <image>, [IMG]"}, {"from": "gpt", "value": "[IMG]"}]},
        {
            "messages": [
                {"role": "user", "content": r"\[IMG] is <image>, [IMG]"},
                {"role": "assistant", "content": "[IMG]"},
            ]
        },
    ],
)
def test_placeholders_of_users_are_places_and_tags_are_then_text(source, record):
    schema = "neo" if "conversations" in record else "messages"
    turns = turns_of(schema, record | {"images": ["a.png", "b.png"]}, source, image_placeholder="[IMG]")
    # A backslash in front of a tag is written twice, so it stays a backslash.
    assert turns == [("user", r"\\<image> is \<image>, <image>", False), ("assistant", "[IMG]", True)]


def test_objects_in_place_of_paths_are_passed_on():
    class StoredFile:
        """As a reader of archives makes it."""

    file = StoredFile()
    assert published("caption", {"jpg": file, "txt": "a"})["image"] == [file]
    assert published("messages", {**LLAMA_FACTORY, "images": [file]})["image"] == [file]
    assert published("interleaved", {"texts": [None, "a"], "images": [file, None]})["image"] == [file]
    content = [{"type": "image", "image": file}]
    assert published("messages", {"messages": [{"role": "user", "content": content}]})["image"] == [file]


def test_videos_are_parts_too(source):
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "Why?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "So."}]}
    checked = check_sample(published("messages", record), source)
    assert [Path(path).name for path in checked.videos] == ["a.mp4"] and checked.turns[0].text == "<video>\nWhy?"
    parts[0] = {"type": "video"}
    assert check_sample(published("messages", record | {"videos": ["a.mp4"]}), source) == checked


USER = {"role": "user", "content": "Hi"}
REJECTED = [
    # schema, record, part of the sentence
    ("messages", {"messages": [USER, {"role": "tool", "content": "4"}]}, "message 1 is of the role 'tool'"),
    ("messages", {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "message 1 has 'tool_calls'"),
    ("messages", {"messages": [USER], "tools": [{"name": "f"}]}, "the key 'tools'"),
    ("messages", {"messages": [{"role": "developer", "content": "x"}]}, "role 'developer', not one of"),
    ("messages", {"messages": [{"role": "user", "content": None}]}, "a string or a list of parts"),
    ("messages", {"messages": [USER | {"from": "human"}]}, "both 'role' and 'from'"),
    ("messages", {"messages": ["Hi"]}, "message 0 must be an object"),
    ("messages", {"messages": "Hi"}, "'messages' must be a list, not str"),
    ("messages", {"messages": [USER | {"content": [{"type": "input_audio"}]}]}, "of the type 'input_audio'"),
    ("messages", {"messages": [USER | {"content": ["Hi"]}]}, "part 0 of message 0 must be an object"),
    (
        "messages",
        {"messages": [USER | {"content": [{"type": "image", "source": {"data": "x"}}]}]},
        "the key 'source', which is not read",
    ),
    (
        "messages",
        {"messages": [USER | {"content": [{"type": "image", "url": "a.png"}, {"type": "image"}]}]},
        "1 parts for <image> name a file and 1 do not",
    ),
    (
        "messages",
        {"messages": [USER | {"content": [{"type": "image", "url": "a.png"}]}], "images": ["b.png"]},
        "differ from those of the record",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "url": "a.png"}]}]},
        "an image or a video in an assistant turn",
    ),
    ("messages", {"messages": [USER], "conversations": [{}]}, "also has 'conversations'"),
    ("messages", {"texts": [{"user": "a"}]}, "element 0 of 'texts' must be an object"),
    ("messages", {"query": "a", "response": "b", "history": ["c"]}, "element 0 of 'history'"),
    ("messages", {"prompt": "a"}, "its keys are 'prompt'"),
    ("caption", {"image": "a.png", "caption": "a", "text": "b"}, "'text' and 'caption' differ"),
    ("caption", {"image": "a.png", "caption": ["a", "b"]}, "must be a string, not a list"),
    ("caption", {"image": "a.png"}, "no caption under 'text'"),
    ("caption", {"text": "a"}, "no image under 'image'"),
    ("caption", {"image": "a.png", "text": " \n"}, "the document has no text"),
    ("caption", {"image": "a.png", "text": "a", "bbox": [[0, 0, 1, 1]]}, "the key 'bbox'"),
    ("interleaved", {"texts": ["a"], "images": [None, "a.png"]}, "must have one length"),
    ("interleaved", {"texts": ["a", None], "images": [None, None]}, "element 1 of 'texts' and 'images'"),
    ("interleaved", {"texts": ["a"], "images": ["a.png"]}, "element 0 of 'texts' and 'images'"),
    (
        "interleaved",
        {"text_list": ["a"], "image_info": [{"image_name": "a", "matched_text_index": 1}]},
        "of the 1 texts",
    ),
    ("interleaved", {"text_list": ["a", 1]}, "element 1 of 'text_list' must be a string"),
    ("interleaved", {"texts": [None], "images": ["a.png"]}, "the document has no text"),
    ("interleaved", {"content": "a"}, "'content' must be a list"),
    ("text", {"text": ["a"]}, "'text' must be a string, not a list"),
    ("text", {"content": "a"}, "no text under 'text'; its keys are 'content'"),
    ("text", {"text": "a", "image": "a.png"}, "1 images but 0 <image> tags"),
    ("text", {"text": "a", "system": "b"}, "a document must be the only turn"),
    ("text", {"text": "a", "loss_mask": 0}, "not to be trained on"),
    ("text", {"text": "a", "sample_weight": 0.5}, "the key 'sample_weight'"),
]


@pytest.mark.parametrize(("schema", "record", "sentence"), REJECTED)
def test_a_record_that_cannot_be_taken_is_rejected_with_the_reason(source, schema, record, sentence):
    assert sentence in rejected(schema, record, source).sentence
