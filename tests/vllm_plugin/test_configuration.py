"""Settings of vLLM with which NEO would compute something else are refused before a model is loaded."""

import json

import pytest
from support.paths import ROOT
from support.processes import run_python
from support.vllm import SCRIPTS, VLLM, needs_vllm, run_vllm

pytestmark = [needs_vllm, pytest.mark.thorough]

SETTINGS = {
    "none": ({}, None),
    "limits": ({"mm_processor_kwargs": {"max_pixels": 65536}}, None),
    "tokenizer mode": ({"tokenizer_mode": "slow"}, "--tokenizer-mode slow: NEO's prompts are tokenized in pieces"),
    "scheduler": (
        {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
        "--scheduler-cls: NEO has its own scheduler, which cuts no image",
    ),
    "long prefill": (
        {"long_prefill_token_threshold": 64},
        "--long-prefill-token-threshold 64: an image of more tokens would never be scheduled",
    ),
    "embeddings of prompts": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds: NEO takes texts and images"),
    "embeddings of images": ({"enable_mm_embeds": True}, "--enable-mm-embeds: NEO takes images"),
    "drafts": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        "--speculative-config: NEO was never run with a draft in vLLM",
    ),
    "tensor parallelism": (
        {"tensor_parallel_size": 4},
        "--tensor-parallel-size 4: must divide NEO's 2 key-value heads",
    ),
    "pipeline parallelism": ({"pipeline_parallel_size": 2}, "ipeline parallelism is not supported"),
}


@pytest.fixture(scope="module")
def errors(reference_of, tmp_path_factory) -> dict[str, str | None]:
    directory = tmp_path_factory.mktemp("settings")
    files = directory / "settings.json", directory / "errors.json"
    files[0].write_text(json.dumps([settings for settings, _ in SETTINGS.values()]))
    checkpoint = reference_of("ckpt_untied").directory
    run_vllm(SCRIPTS / "settings.py", checkpoint, *files, directory=directory)
    return dict(zip(SETTINGS, json.loads(files[1].read_text()), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(errors, name):
    expected = SETTINGS[name][1]
    if expected is None:
        assert errors[name] is None
    else:
        assert expected in errors[name]


def test_another_version_of_vllm_is_refused():
    code = (
        "import vllm; vllm.__version__ = '0.33.1'; from neo_megatron.vllm_plugin import registration as r; r.register()"
    )
    done = run_python("-c", code, environment={"PYTHONPATH": str(ROOT)}, python=VLLM)
    assert done.returncode == 1
    assert "vLLM 0.33.1: the plug-in of neo_megatron is written for 0.32; install that version" in done.stdout
