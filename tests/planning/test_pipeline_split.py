"""Stages are cut where the costliest is cheapest; what Megatron's flags say comes first."""

from argparse import Namespace
from itertools import combinations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from neo_megatron.errors import ConfigError
from neo_megatron.model import native_attention
from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.planning.pipeline_split import (
    UNEVEN_SPLIT_FLAGS,
    Costs,
    balanced_split,
    choose_layout,
    layer_counts,
    slowest_rank,
)
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES

costs = st.integers(1, 30).map(float)


# The most even cut of these, 2 | 2 | 4 + 1, has a costlier stage than 2 + 2 | 4 | 1.
@example([2.0, 2.0, 4.0, 1.0], 3, 0, 0)
@given(st.lists(costs, min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_no_other_split_has_a_cheaper_costliest_stage(layers, stages, before, after):
    stages = min(stages, len(layers))

    def costs_of(cuts):
        bounds = [0, *cuts, len(layers)]
        parts = [sum(layers[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
        parts[0] += before
        parts[-1] += after
        return max(parts), sum(part**2 for part in parts)

    counts = balanced_split(layers, stages, before, after)
    assert len(counts) == stages and sum(counts) == len(layers) and min(counts) >= 1
    cuts = [sum(counts[:stage]) for stage in range(1, stages)]
    assert costs_of(cuts) == min(costs_of(c) for c in combinations(range(1, len(layers)), stages - 1))


DEFAULTS = {
    "pipeline_model_parallel_layout": None,
    "pre_buffer_pipeline_stages": 0,
    "seq_length": 16384,
    "recompute_granularity": None,
    **dict.fromkeys(UNEVEN_SPLIT_FLAGS),
}


def run(model: str, ranks: int, stage: int = 2, virtual: int | None = None, **flags) -> tuple[str | None, str]:
    settings = {"pipeline_model_parallel_size": ranks, "num_virtual_stages_per_pipeline_rank": virtual}
    return choose_layout(Namespace(**{**DEFAULTS, **settings, "training_stage": stage, **flags}), SIZES[model])


def test_the_pre_buffer_gets_stages_of_its_own():
    layout, table = run("tiny", 2, pre_buffer_pipeline_stages=1)
    assert layout == "Ett|ttL"
    assert "0-1" in table and "with embeddings" in table and "2-3" in table and "with head" in table
    layout, _ = run("neo-2b", 4, pre_buffer_pipeline_stages=1)
    stages = layout.split("|")
    assert stages[0] == "E" + 12 * "t" and sum(stage.count("t") for stage in stages[1:]) == 28
    # The head, on a tenth of the positions, costs less than a layer: no stage of the post-LLM has a layer too many.
    assert {stage.count("t") for stage in stages[1:]} == {9, 10} and stages[3].count("t") == 9


def test_frozen_layers_are_cheaper_so_that_a_stage_holds_more_of_them():
    counts = {stage: layer_counts(run("neo-9b", 4, stage)[0], 42, 4) for stage in (1, 2)}
    assert counts[1][0] < counts[2][0]  # six of its layers train, after the patch embedding
    costs = Costs.of(SIZES["neo-9b"], 1, Workload.of_alike_documents(16384))
    assert slowest_rank(counts[1], costs, 4) < slowest_rank(counts[2], costs, 4) < 1.2


def test_virtual_stages_are_cut_too():
    layout, table = run("neo-2b", 2, virtual=2, pre_buffer_pipeline_stages=1)
    assert [stage.count("t") for stage in layout.split("|")] == [12, 9, 10, 9]
    assert "1, chunk 1" in table


def test_megatron_splits_what_it_can_split_evenly():
    layout, table = run("neo-2b", 4, stage=1)
    assert layout is None and "10-19" in table
    # In stage 1 the first ten layers all train; the better split is named, to be pasted.
    better = table.split("'")[1]
    assert layer_counts(better, 40, 4)[0] < 10
    assert run("neo-2b", 1) == (None, "")
    assert run("neo-9b", 4, decoder_first_pipeline_num_layers=9) == (None, "")
    layout, _ = run("neo-9b", 4)
    assert sum(layer_counts(layout, 42, 4)) == 42


def test_the_work_of_the_packs_decides():
    """The head costs as much as layers if every position is trained."""
    flags = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": None, "training_stage": 2}
    counts = {}
    for share in (0.1, 1.0):
        workload = Workload(16384, mean_keys=1000, image_share=0.5, trained_share=share, source="given here")
        layout, table = choose_layout(
            Namespace(**DEFAULTS, **flags), SIZES["neo-2b"].replace(post_llm_layers=27), workload
        )
        counts[share] = layer_counts(layout, 39, 2)
        assert "(packs: given here)" in table
    assert counts[1.0][1] < counts[0.1][1]


def test_a_layout_given_by_hand_wins():
    layout, table = run("tiny", 2, pre_buffer_pipeline_stages=1, pipeline_model_parallel_layout="Et|t*3L")
    assert layout == "Et|t*3L" and "1-3" in table


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"ranks": 2, "pre_buffer_pipeline_stages": 2}, "2 with --pipeline-model-parallel-size 2: both the pre-buffer"),
        ({"ranks": 4, "pre_buffer_pipeline_stages": 3}, "2 pre-buffer and 2 post-LLM layers are fewer than their"),
        ({"ranks": 8}, "4 layers are too few for 8 pipeline stages"),
        ({"ranks": 2, "pipeline_model_parallel_layout": "Ett|tL"}, "it has 3 layers, the model has 4"),
        ({"ranks": 2, "pipeline_model_parallel_layout": "tt|Ett"}, "must begin with one E"),
        ({"ranks": 2, "pipeline_model_parallel_layout": "Ett|ttx"}, "write E for the embeddings"),
        ({"ranks": 2, "pipeline_model_parallel_layout": "Et|t|ttL"}, "its 3 stages are not a multiple"),
        ({"ranks": 2, "seq_length": None}, "give --train-data-path or --seq-length"),
    ],
)
def test_an_impossible_split_is_refused(flags, sentence):
    with pytest.raises(ConfigError, match=sentence):
        run("tiny", **flags)


@pytest.mark.parametrize("stage", [1, 2])
def test_costs_are_in_the_proportion_of_what_torch_counts(megatron, monkeypatch, stage):
    """Models that differ by one layer, or by the rows of the head, differ by the operations of just that.

    But for the attention core, which has its own test next to the planner's formula.
    """
    sizes, tokens, image_tokens, trained = SIZES["tiny"], 32, 8, 12

    def without_scores(query, key, value, *_unused, **_also):
        return value.repeat_interleave(query.shape[2] // key.shape[2], dim=2).flatten(2) + query.sum() + key.sum()

    monkeypatch.setattr(native_attention, "attend", without_scores)

    def counted(**changes: int) -> int:
        config = NeoConfig.from_sizes(
            sizes.replace(**changes), transformer_impl="local", gradient_accumulation_fusion=False
        )
        model = NeoModel(config)
        freeze_for_stage(model, stage)
        with FlopCounterMode(display=False) as counter:
            model(
                tokens=torch.zeros(1, tokens, dtype=torch.int64),
                positions_thw=torch.zeros(1, tokens, 3, dtype=torch.int32),
                document=torch.zeros(1, tokens, dtype=torch.int32),
                image=-torch.ones(1, tokens, dtype=torch.int32),
                patches=torch.zeros(image_tokens, 4, 768, dtype=torch.uint8),
                image_token_index=torch.arange(image_tokens),
                image_token_position=torch.zeros(image_tokens, 2, dtype=torch.int32),
                target_index=torch.arange(trained),
                targets=torch.zeros(trained, dtype=torch.int64),
            ).sum().backward()
        return counter.get_total_flops()

    workload = Workload(tokens, mean_keys=0, image_share=image_tokens / tokens, trained_share=trained / tokens)
    planned = Costs.of(sizes, stage, workload)
    total = counted()
    assert sum(planned.stages([4])) * tokens == total
    assert planned.layers[0] * tokens == counted(pre_buffer_layers=3) - total
    assert planned.layers[-1] * tokens == counted(post_llm_layers=3) - total
    assert planned.head * tokens == counted(vocab_size=2 * sizes.vocab_size) - total
    assert (planned.layers[0] == planned.layers[-1]) == (stage == 2)
