"""The token layout compared with the published one: complete strings through the transformers tokenizer."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from neo_megatron.data.chat import (
    NEO_TOKENS,
    ChatEncoder,
    add_neo_tokens,
    load_tokenizer,
    special_ids,
    tokenizer_fingerprint,
)
from neo_megatron.data.conversation import Turn
from neo_megatron.errors import DataError

TRICKY = [
    "",
    " ",
    "\n\n",
    "a\n",
    "  x",
    "你好 é",
    "e\u0301 \u0301",
    "don't 12345",
    "👩‍👩‍👧",
    "<think>so</think>",
    "<image",
    "%<img",
]


@pytest.fixture(scope="module")
def neo(tokenizer):
    return load_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def encoder(neo):
    return ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo))


def published_layout(tokenizer, turns: list[Turn], counts: list[int]) -> tuple[list[int], list[bool]]:
    """NEO's rule read literally: strings with control tokens in them, which the tokenizer recognises."""
    counts, tokens, trained = list(counts), [], []
    for turn in turns:
        text = turn.text
        while "<image>" in text:
            text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * counts.pop(0)}</img>", 1)
        if turn.role == "assistant":
            strings = [("<|im_start|>assistant\n", False), (f"{text}<|im_end|>\n", turn.trained)]
        else:
            strings = [(f"<|im_start|>{turn.role}\n{text}<|im_end|>\n", False)]
        for string, is_trained in strings:
            ids = tokenizer(string, add_special_tokens=False).input_ids
            tokens += ids
            trained += [is_trained] * len(ids)
    return tokens, trained


def mask(spans: np.ndarray, length: int) -> list[bool]:
    trained = np.zeros(length, bool)
    for start, end in spans:
        trained[start:end] = True
    return trained.tolist()


@pytest.mark.parametrize("text", TRICKY)
@pytest.mark.parametrize("is_input", [False, True])
def test_layout_equals_that_of_complete_strings(neo, encoder, text, is_input):
    turns = [
        Turn("system", text, False),
        Turn("user", f"{text}<image>{text}<image>\n{text}", False),
        Turn("assistant", text, not is_input),
        Turn("user", text, False),
        Turn("assistant", f"ok {text}", True),
    ]
    (encoded,) = encoder.encode([(turns, [3, 5])])
    tokens, trained = published_layout(neo, turns, [3, 5])
    assert encoded.tokens.tolist() == tokens
    assert mask(encoded.spans, len(tokens)) == trained


def test_a_batch_equals_its_samples(encoder):
    samples = [([Turn("user", text, False), Turn("assistant", text + "!", True)], []) for text in TRICKY]
    for together, alone in zip(
        encoder.encode(samples), (encoder.encode([sample])[0] for sample in samples), strict=True
    ):
        assert together.tokens.tolist() == alone.tokens.tolist()
        assert together.spans.tolist() == alone.spans.tolist()


def test_special_tokens_typed_by_users_stay_text(neo, encoder):
    special = sorted(set(neo.all_special_tokens) | set(NEO_TOKENS))
    typed = " ".join(special) + "".join(special)
    turns = [Turn("user", typed, False), Turn("assistant", typed, True)]
    (encoded,) = encoder.encode([(turns, [])])
    ids = special_ids(neo)
    controls = [ids.turn_start, ids.turn_end, ids.turn_start, ids.turn_end]
    assert [token for token in encoded.tokens if token in set(neo.convert_tokens_to_ids(special))] == controls
    assert neo.decode(encoded.tokens) == "".join(
        f"<|im_start|>{role}\n{typed}<|im_end|>\n" for role in ("user", "assistant")
    )


def test_tags_of_an_assistant_and_escaped_tags_are_text(neo, encoder):
    turns = [Turn("user", r"a \<image> <image> <video>", False), Turn("assistant", r"<image> \<image>", True)]
    (encoded,) = encoder.encode([(turns, [3])])
    (start, end), ids = encoded.spans[0], special_ids(neo)
    assert neo.decode(encoded.tokens[start:end]) == "<image> <image><|im_end|>\n"
    assert neo.decode(encoded.tokens[:start]) == (
        f"<|im_start|>user\na <image> <img>{'<IMG_CONTEXT>' * 3}</img> <video><|im_end|>\n<|im_start|>assistant\n"
    )
    assert encoded.tokens.tolist().count(ids.image_context) == 3


def test_neo_tokens_are_appended_once_in_order(tokenizer):
    plain = AutoTokenizer.from_pretrained(tokenizer)
    known = {token: plain.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")}
    size = len(plain)
    assert add_neo_tokens(plain) == len(NEO_TOKENS) - 2
    assert add_neo_tokens(plain) == 0
    assert plain.convert_tokens_to_ids(["<IMG_CONTEXT>", "<img>", "</img>"]) == [896, 897, 898]
    assert {token: plain.convert_tokens_to_ids(token) for token in known} == known
    new = [token for token in NEO_TOKENS if token not in known]
    assert plain.convert_tokens_to_ids(new) == list(range(size, size + len(new)))


def test_the_fingerprint_depends_on_all_that_changes_ids(neo):
    text = neo.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(text) == tokenizer_fingerprint(text.replace(", ", ","))
    assert tokenizer_fingerprint(text) != tokenizer_fingerprint(text.replace('"NFC"', '"NFKC"'))
    assert tokenizer_fingerprint(text) != tokenizer_fingerprint(text.replace("<IMG_CONTEXT>", "<CONTEXT>"))


def test_a_directory_without_a_tokenizer_is_reported(tmp_path):
    with pytest.raises(DataError, match="does not hold a tokenizer"):
        load_tokenizer(tmp_path)
