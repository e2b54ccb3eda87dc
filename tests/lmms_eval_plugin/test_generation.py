"""How a task's `generation_kwargs` are understood."""

import pytest

from neo_megatron.lmms_eval_plugin.generation import generation


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        # Greedily by default, with a temperature of 0, and where sampling is forbidden.
        ({}, {"max_new_tokens": 1024}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": False}, {"max_new_tokens": 16}),
        ({"max_gen_toks": 32, "temperature": 0.7, "do_sample": False}, {"max_new_tokens": 32}),
        ({"do_sample": True, "temperature": 0.0, "top_p": 0}, {"max_new_tokens": 1024}),
        # A temperature samples, unless something says otherwise.
        (
            {"max_new_tokens": 8, "temperature": 0.2, "top_p": None, "top_k": 20},
            {"max_new_tokens": 8, "do_sample": True, "temperature": 0.2, "top_k": 20},
        ),
        ({"do_sample": True, "top_p": 0.9}, {"max_new_tokens": 1024, "do_sample": True, "top_p": 0.9}),
        (
            {"do_sample": True, "temperature": 1, "top_p": 0, "top_k": 0},
            {"max_new_tokens": 1024, "do_sample": True, "temperature": 1, "top_k": 0},
        ),
        ({"num_beams": 3, "temperature": 0}, {"max_new_tokens": 1024, "num_beams": 3}),
    ],
)
def test_sampling_only_where_the_task_wants_it(settings, arguments):
    assert generation(settings).arguments == arguments


def test_unknown_keys_are_named():
    known = {"until": ["\n"], "max_new_tokens": 4, "repetition_penalty": 1.1}
    assert generation({**known, "image_aspect_ratio": "original", "modalities": ["video"]}).ignored == (
        "image_aspect_ratio",
        "modalities",
    )


@pytest.mark.parametrize(
    ("until", "answer"),
    [
        (None, "yes.\n\nIt is\nred"),
        ([], "yes.\n\nIt is\nred"),
        (["\n\n"], "yes.\n\nIt is\nred"),  # lmms-eval's default, not a wish of the task
        (["\n\n", "\n", ""], "yes."),
        ("red", "yes.\n\nIt is\n"),
        (["red", "It"], "yes.\n\n"),
    ],
)
def test_an_answer_ends_at_the_first_stop(until, answer):
    assert generation({"until": until}).cut("yes.\n\nIt is\nred") == answer
