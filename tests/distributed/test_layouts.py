"""Every layout trains the same model: from one checkpoint, on real packs with images, three steps, in float32.

Losses within 2e-6 and the last gradients, each complete tensor, within 1e-5 relative of the run on one process.
In bfloat16 every product is rounded to 8 bits (2e-3 relative), wherever a layout cuts it: losses are averages over
tokens and stay within 2e-3; single gradients, sums of rounded terms of both signs, within 5e-2.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.layout_runs import IN_HEAD, SMALL, assert_same, layout_job, write_random_model
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source

TP2, PP2, CP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "context"))
SP, ALLGATHER, A2A = "--sequence-parallel", "--cp-comm-type allgather", "--cp-comm-type a2a"
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
SELECTIVE = "--recompute-granularity selective --recompute-modules"
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
EVALUATION = "--valid-data-path {packs} --eval-interval 3 --eval-iters 1"

# Processes, then flags; every step has four packs.
LAYOUTS = {
    "one": (1, EVALUATION),
    "one-micro-batch": (1, "--micro-batch-size 4"),
    "tp2": (2, TP2),
    "tp2-sp": (2, f"{TP2} {SP}"),
    "pp2": (2, f"{PP2} --pre-buffer-pipeline-stages 1"),
    "pp2-vp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
    "cp2-a2a": (2, f"{CP2} {A2A}"),
    "cp2-allgather": (2, f"{CP2} {ALLGATHER} --micro-batch-size 2"),
    "dp2": (2, ""),
    "dp2-distributed": (2, f"{DISTRIBUTED} {EVALUATION}"),
    "pp4": (4, "--pipeline-model-parallel-size 4"),
    "cp4-a2a": (4, f"--context-parallel-size 4 {A2A}"),
    "cp4-allgather": (4, f"--context-parallel-size 4 {ALLGATHER}"),
    "tp2-pp2-sp": (4, f"{TP2} {PP2} {SP}"),
    "tp2-cp2-sp": (4, f"{TP2} {CP2} {SP} {A2A} --micro-batch-size 2 {EVALUATION}"),
    "pp2-cp2": (4, f"{PP2} {CP2} {ALLGATHER}"),
    "pp2-dp2-distributed": (4, f"{PP2} {DISTRIBUTED}"),
    "tp2-pp2-full": (4, f"{TP2} {PP2} {FULL}"),
    "tp2-pp2-selective": (4, f"{TP2} {PP2} {SELECTIVE} core_attn mlp_act qkv_heads"),
    "tp2-cp2-selective": (4, f"{TP2} {CP2} {ALLGATHER} --recompute-granularity selective"),
}
EVALUATED = [name for name, (_, flags) in LAYOUTS.items() if EVALUATION in flags]
BFLOAT16 = ("one", "tp2-sp", "cp2-a2a", "dp2-distributed", "pp2-cp2")
# Their parts are in others too.
THOROUGH = ("pp4", "cp4-a2a", "cp4-allgather", "tp2-pp2-full", "tp2-pp2-selective", "tp2-cp2-selective")
# Few packs of which some train next to nothing: how many processes and micro-batches share them must not matter.
LOPSIDED = {
    "one": (1, ""),
    "one-micro-batch": (1, "--micro-batch-size 4"),
    "cp2": (2, f"{CP2} {A2A}"),
    "dp4": (4, ""),
}
# The attention of a NEO-unify; mixtures of experts have it too (test_experts.py).
UNIFY = {
    "plain": {
        "one": (1, f"{EVALUATION} --eval-interval 3"),
        "tp2-sp-full": (2, f"{TP2} {SP} {FULL}"),
        "pp2-vp2": (2, f"{PP2} --num-virtual-stages-per-pipeline-rank 2"),
        "cp2-allgather-selective": (2, f"{CP2} {ALLGATHER} --recompute-granularity selective"),
        "cp2-a2a": (2, f"{CP2} {A2A} {EVALUATION} --eval-interval 3"),
    },
    "bfloat16": {
        "one": (1, "--bf16"),
        "tp2-sp": (2, f"{TP2} {SP} --bf16"),
        "pp2-cp2": (4, f"{PP2} {CP2} {A2A} --bf16"),
    },
    "stage-1": {
        "one": (1, ""),
        "tp2-sp": (2, f"{TP2} {SP}"),
        "pp2-distributed": (2, f"{PP2} --pre-buffer-pipeline-stages 1 {DISTRIBUTED}"),
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("model"), SMALL)


@pytest.fixture(scope="module")
def unify(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("unify"), IN_HEAD)


@pytest.fixture(scope="module")
def lopsided(tmp_path_factory) -> Path:
    """Four packs of one document each, whose answers, short and long, stand in the second half of the pack.

    One of them has an image that cannot be decoded, so that none of its tokens counts.
    """
    room = tmp_path_factory.mktemp("lopsided")
    (room / "images").mkdir()
    complete = (GOLDEN / "images" / "b.png").read_bytes()
    (room / "images" / "complete.png").write_bytes(complete)
    (room / "images" / "broken.png").write_bytes(complete[:-200])
    question, answer = "The question is long and says nothing that would help. " * 5, "It is so. " * 6
    annotations = [
        {
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": text}],
            **({"image": [f"images/{image}.png"]} if image else {}),
        }
        for text, image in (("Yes.", None), (answer, None), ("No.", "complete"), (answer, "broken"))
    ]
    (room / "annotations.json").write_text(json.dumps(annotations))
    source = Source("lopsided", str(room / "annotations.json"), str(room))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=4096, check="header")
    preprocess([source], GOLDEN / "tokenizer", room / "shards", settings)
    write_packs([PackInput(str(room / "shards"))], room / "packs", 192)
    packs = [PackDataset(room / "packs", 4, seed=1234)[number] for number in range(4)]
    assert min(int(pack["target_index"].min()) for pack in packs) >= 96
    weights = sorted(float(pack["target_weight"].sum()) for pack in packs)
    assert weights[0] == 0 < 2 * weights[1] < weights[3]
    return room / "packs"


def layout_run(directory: Path, model: Path, packs: Path, flags: str, iterations: int = 3) -> Job:
    """Of packs that may have broken images."""
    flags = f"--max-broken-samples 0.5 {flags.format(packs=packs)}"
    return layout_job(directory, model, packs, flags, iterations)


@pytest.fixture(scope="module")
def more_runs(room, model, runs, tmp_path_factory) -> dict[str, Job]:
    """With the thorough ones, which are of four processes."""
    directory = tmp_path_factory.mktemp("more-layouts")
    jobs = {
        f"float32-{name}": layout_run(directory / name, model, room / "packs", LAYOUTS[name][1]) for name in THOROUGH
    }
    run_jobs(4, list(jobs.values()))
    return runs | jobs


@pytest.fixture(scope="module")
def runs(room, model, unify, lopsided, tmp_path_factory) -> dict[str, Job]:
    """All runs but those, in one launch for each number of processes."""
    directory = tmp_path_factory.mktemp("layouts")

    def job(kind: str, name: str, packs: Path, flags: str, iterations: int = 3) -> Job:
        return layout_run(directory / f"{kind}-{name}", model, packs, flags, iterations)

    by_processes: dict[int, list[Job]] = {1: [], 2: [], 4: []}
    for name, (processes, flags) in LAYOUTS.items():
        if name not in THOROUGH:
            by_processes[processes].append(job("float32", name, room / "packs", flags))
        if name in BFLOAT16:
            by_processes[processes].append(job("bfloat16", name, room / "packs", f"{flags} --bf16"))
    for name, (processes, flags) in LOPSIDED.items():
        by_processes[processes].append(job("lopsided", name, lopsided, flags, iterations=2))
    for kind, layouts in UNIFY.items():
        for name, (processes, flags) in layouts.items():
            flags = f"{flags} --training-stage {1 if kind == 'stage-1' else 2}".format(packs=room / "packs")
            unified = layout_job(directory / f"unify-{kind}-{name}", unify, room / "packs", flags, iterations=3)
            by_processes[processes].append(unified)
    saving = f"{TP2} {PP2} --save {directory}/saved --lr 0 --min-lr 0"
    by_processes[4].append(job("saved", "tp2-pp2", room / "packs", saving, iterations=1))
    for processes, jobs in by_processes.items():
        run_jobs(processes, jobs)
    return {job.directory.name: job for jobs in by_processes.values() for job in jobs}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one" and name not in THOROUGH])
def test_losses_and_gradients_of_three_steps(runs, layout):
    assert_same(SMALL, runs[f"float32-{layout}"], runs["float32-one"], loss=2e-6, gradient=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("layout", THOROUGH)
def test_more_layouts(more_runs, layout):
    assert_same(SMALL, more_runs[f"float32-{layout}"], more_runs["float32-one"], loss=2e-6, gradient=1e-5)


@pytest.mark.parametrize(
    ("kind", "layout"), [(kind, name) for kind, layouts in UNIFY.items() for name in layouts if name != "one"]
)
def test_the_attention_of_a_neo_unify(runs, kind, layout):
    loss, gradient = (2e-3, 5e-2) if kind == "bfloat16" else (2e-6, 1e-5)
    assert_same(IN_HEAD, runs[f"unify-{kind}-{layout}"], runs[f"unify-{kind}-one"], loss=loss, gradient=gradient)


@pytest.mark.parametrize(
    ("kind", "layout", "step"),
    [*(("float32", name, 3) for name in EVALUATED if name != "one"), ("unify-plain", "cp2-a2a", 3)],
)
def test_evaluation(runs, kind, layout, step):
    expected, actual = (runs[f"{kind}-{name}"].scalars("lm loss validation") for name in ("one", layout))
    assert len(expected[step]) == 1
    assert actual[step] == pytest.approx(expected[step], abs=2e-6, rel=0)


@pytest.mark.parametrize("layout", [name for name in BFLOAT16 if name != "one"])
def test_bfloat16(runs, layout):
    assert_same(SMALL, runs[f"bfloat16-{layout}"], runs["bfloat16-one"], loss=2e-3, gradient=5e-2)


@pytest.mark.parametrize("spread", [name for name in LOPSIDED if name != "one"])
def test_ranks_with_few_trained_tokens_or_none(runs, spread):
    """CP2: the first rank has no trained token; DP4: the ranks have a few, many, and one pack that does not count."""
    assert_same(SMALL, runs[f"lopsided-{spread}"], runs["lopsided-one"], loss=2e-6, gradient=1e-5)


@pytest.mark.parametrize("layout", ["pp2-cp2", "tp2-pp2-sp"])
def test_images_go_to_who_embeds_them_and_labels_to_who_has_the_loss(runs, layout):
    """Two ranks a stage. Parts of a sequence embed their own images; tensor-parallel ranks share the loss out."""
    alone = runs["float32-one"].inputs(0)[: 3 * 4]  # it evaluates afterwards
    first, last = ([runs[f"float32-{layout}"].inputs(rank) for rank in stage] for stage in ((0, 1), (2, 3)))
    to_embed, labels = {"tokens", "patches", "image_token_index", "image_token_position"}, {"targets", "target_index"}
    assert any(call["patches"] for call in alone)
    for call, *of_ranks in zip(alone, *first, *last, strict=True):
        first_stage, last_stage = of_ranks[:2], of_ranks[2:]
        assert all(to_embed <= given.keys() and not labels & given.keys() for given in first_stage)
        assert all(labels <= given.keys() and not to_embed & given.keys() for given in last_stage)
        assert sum(given["patches"] for given in first_stage) == call["patches"]
        trained = [given["targets"] for given in last_stage]
        assert sum(trained) == call["targets"] if "cp" in layout else trained == [call["targets"]] * 2


def test_what_training_saves_on_a_layout_exports_to_the_bytes_that_came_in(model, runs, tmp_path):
    """Hugging Face -> Megatron -> a step at a learning rate of zero on TP2 x PP2, saved -> Hugging Face."""
    saved = runs["saved-tp2-pp2"].directory.with_name("saved")
    convert_megatron_to_hf(saved, tmp_path / "hf", load_tokenizer(GOLDEN / "tokenizer"))
    expected, actual = (load_file(path / "model.safetensors") for path in (model, tmp_path / "hf"))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name
