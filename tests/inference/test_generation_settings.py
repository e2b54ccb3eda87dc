"""`generation_config.json` of a checkpoint is read by transformers only after its values were checked."""

import json

import pytest

from neo_megatron.checked_files import UnreadableFile
from neo_megatron.inference.generation_settings import check_generation_config


def check(directory, **settings) -> None:
    (directory / "generation_config.json").write_text(json.dumps(settings))
    check_generation_config(directory, vocab_size=100)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eos_token_id": 5},
        {"eos_token_id": [5, 99], "pad_token_id": 0, "bos_token_id": None},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05},
        {"max_new_tokens": 2048, "transformers_version": "4.57.0", "_from_model_config": True},
    ],
)
def test_usual_settings_pass(tmp_path, settings):
    check(tmp_path, **settings)


def test_settings_are_optional(tmp_path):
    check_generation_config(tmp_path, vocab_size=100)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("eos_token_id", value) for value in (100, -1, "5", [5, 100], [[5]], list(range(65)), 5.0, True)),
        *(("pad_token_id", value) for value in ([5], [], {}, "5", 100)),
        *(("bos_token_id", value) for value in ([5], 10**30)),
        *(("temperature", value) for value in (-1, 1e4, "1", [1.0], True)),
        *(("top_k", value) for value in (1.5, -1, 10**30)),
        ("max_new_tokens", 0),
        ("num_beams", 4),
        ("assistant_model", "other/model"),
        ("unknown", 1),
    ],
)
def test_invalid_values_are_one_sentence_with_the_file(tmp_path, key, value):
    with pytest.raises(UnreadableFile, match=rf"generation_config.json: {key} is .*: remove it there"):
        check(tmp_path, **{key: value})
