"""Markers that follow from a test's place, so that no test file has to repeat them."""

from collections.abc import Iterable

import pytest

from support.paths import ROOT

# Beginnings of paths below the repository. Slow tests start training jobs, servers, browsers or other environments.
PLACES = {
    "distributed": ("tests/distributed/",),
    "gpu": ("tests/gpu/",),
    "slow": (
        "tests/benchmarks/test_gpu",
        "tests/benchmarks/test_serve",
        "tests/checkpoint/test_convert",
        "tests/checkpoint/test_mutations",
        "tests/cli/test_commands_page",
        "tests/cli/test_main",
        "tests/data/prepare/test_annotation_files",
        "tests/data/prepare/test_annotation_properties",
        "tests/data/prepare/test_executors",
        "tests/data/prepare/test_record_bounds",
        "tests/data/prepare/test_resume",
        "tests/data/prepare/test_what_is_kept",
        "tests/data/shards/test_hostile_",
        "tests/data/test_hostile_",
        "tests/data/test_golden_inputs",
        "tests/data/test_qwen_tokenizer",
        "tests/demo/",
        "tests/distributed/",
        "tests/examples/",
        "tests/hf/test_docs",
        "tests/hf/test_graphs",
        "tests/hf/test_processor_calls",
        "tests/hf/test_remote_code",
        "tests/hf/test_serving",
        "tests/hf/test_transformers_",
        "tests/hf/test_trl",
        "tests/inference/test_evaluate",
        "tests/kernels/",
        "tests/lmms_eval_plugin/",
        "tests/megatron_compat/test_saving",
        "tests/model/test_compiled",
        "tests/model/test_context_parallel",
        "tests/model/test_layer_specs",
        "tests/parity/",
        "tests/planning/test_activations",
        "tests/planning/test_dry_run",
        "tests/planning/test_plan",
        "tests/planning/test_search",
        "tests/planning/test_state",
        "tests/run/test_loader_workers",
        "tests/run/test_output_lock",
        "tests/run/test_start_checks",
        "tests/run/test_step_log",
        "tests/storage/test_storage",
        "tests/vllm_plugin/test_engine",
        "tests/vllm_plugin/test_server",
        "tests/test_command_line",
        "tests/test_outputs",
        "tests/test_pages",
        "tests/test_processes",
        "tests/test_redaction",
        "tests/test_signals",
    ),
}

# Runs a test with the `checkpoint` of each variant of the family.
every_variant = pytest.mark.parametrize("checkpoint", ["separate", "in-head", "experts"], indirect=True)


def add_markers(items: Iterable[pytest.Item]) -> None:
    """Marks each test by its place; called by `pytest_collection_modifyitems` of tests/conftest.py."""
    for item in items:
        path = item.path.relative_to(ROOT).as_posix()
        for marker, beginnings in PLACES.items():
            if path.startswith(beginnings):
                item.add_marker(marker)
        if item.get_closest_marker("thorough"):
            item.add_marker("slow")
