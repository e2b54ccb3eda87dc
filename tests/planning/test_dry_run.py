"""`pretrain_neo --dry-run` on one process: what it finds, for a run of any size, and that it leaves nothing behind."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from support.paths import GOLDEN
from support.processes import run_forked

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.named_sizes import sizes_of
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.planning.layout import Layout
from neo_megatron.planning.report import layout_text, recomputation_text
from neo_megatron.planning.search import candidates, flags
from neo_megatron.planning.state import rank_state
from neo_megatron.planning.workload import Workload
from neo_megatron.presets import SIZES as PRESETS

# Some of the layouts that the search looks at, from all over its list.
SIZES = sizes_of(str(GOLDEN / "ckpt_untied"))
ALL = list(candidates(SIZES, 16, Workload.of_alike_documents(192), 2, 32, "bf16", gpus_per_machine=8))
FOUND = ALL[len(ALL) // 8 :: len(ALL) // 4]
FP8 = list(candidates(SIZES, 16, Workload.of_alike_documents(192), 2, 32, "fp8", gpus_per_machine=8))
FOUND += [layout for layout in FP8 if layout.pipeline_model_parallel_size > 1][:1]
FOUND += [layout for layout in FP8 if layout.recomputes("layernorm")][:1]
# The same of a preset with experts, on a part of the layouts, of which there are many.
HALF = {"tensor_model_parallel_size": 2, "context_parallel_size": 2}
EXPERTS = list(candidates(PRESETS["u1-a3b"], 16, Workload.of_alike_documents(192), 2, 32, "bf16", 8, given=HALF))
FOUND_EXPERTS = [layout for layout in EXPERTS if layout.expert_model_parallel_size > 1]
FOUND_EXPERTS = [FOUND_EXPERTS[len(FOUND_EXPERTS) // 2], *(it for it in FOUND_EXPERTS if it.recomputes("moe"))][:2]

ZERO_3 = "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --bf16"


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> dict[str, tuple[str, str | None, Path]]:
    """Output and exit code of each run, and the directory that all share."""
    room = tmp_path_factory.mktemp("dry_run")
    documents = json.loads((GOLDEN / "meta.json").read_text())["untied_pack1"]["docs"]
    (room / "annotations.json").write_text(json.dumps(documents * 8))
    source = Source("golden", str(room / "annotations.json"), str(GOLDEN))
    preprocess([source], GOLDEN / "tokenizer", room / "shards", PreprocessConfig(min_pixels=4096, max_pixels=65536))
    write_packs([PackInput(str(room / "shards"))], room / "packs", 192)
    write_packs([PackInput(str(room / "shards"))], room / "long", 384)
    (room / "lengths.yaml").write_text("- {from: 0, shares: {packs: 1}}\n- {from: 8, shares: {long: 1}}\n")
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    shutil.copytree(room / "golden", room / "cut")
    (room / "experts").mkdir()
    sizes = SIZES.replace(attention_form="in-head", num_experts=4, experts_per_token=2, expert_ffn_hidden_size=32)
    (room / "experts" / "config.json").write_text(json.dumps(sizes.to_hf()))
    piece = next((room / "cut").glob("*/*.distcp"))
    piece.write_bytes(piece.read_bytes()[:-1])

    common = f"--neo-model {GOLDEN}/ckpt_untied --train-data-path {room}/packs --micro-batch-size 1 --train-iters 3 "
    common += f"--tensorboard-dir {room}/events --save {room}/saved --dry-run "
    golden = f"--pretrained-checkpoint {room}/golden "
    lengths = common.replace(f"--train-data-path {room}/packs", f"--mixture {room}/lengths.yaml")
    large = "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 "
    large += "--use-distributed-optimizer --global-batch-size 256"
    experts = f"{common.replace(f'{GOLDEN}/ckpt_untied', f'{room}/experts')}--transformer-impl local --bf16 "
    experts += "--expert-model-parallel-size 4 --expert-tensor-parallel-size 1 --tensor-model-parallel-size 2 "
    jobs = {
        "one process": (1, common + golden + "--global-batch-size 4"),
        "1,024 processes": (1024, common + golden + large),
        "sharded data parallelism": (64, f"{common}{golden}{ZERO_3} --global-batch-size 64"),
        "Muon": (
            8,
            f"{common.replace(f'{GOLDEN}/ckpt_untied', 'neo-2b')} --training-stage 2 --bf16 --global-batch-size 8 "
            "--use-distributed-optimizer --optimizer muon",
        ),
        "damaged checkpoint": (1, common + f"--pretrained-checkpoint {room}/cut --global-batch-size 4"),
        "another model": (1, common + golden + "--global-batch-size 4 --ffn-hidden-size 128"),
        "another length": (1, common + golden + "--global-batch-size 4 --seq-length 128"),
        "experts": (
            16,
            experts + "--sequence-parallel --global-batch-size 8 --moe-token-dispatcher-type allgather",
        ),
        "experts that do not divide": (6, experts + "--sequence-parallel --global-batch-size 6"),
        "two lengths": (1, lengths + "--global-batch-size 4"),
        "the short ones": (1, lengths + "--global-batch-size 4 --train-iters 2"),
        "a border within a step": (1, lengths + "--global-batch-size 3"),
        "no such layout": (6, common + golden + "--global-batch-size 4 --tensor-model-parallel-size 4"),
    }
    preset = common.replace(f"{GOLDEN}/ckpt_untied", "u1-a3b")
    for number, layout in enumerate(FOUND + FOUND_EXPERTS):
        model = preset if layout in FOUND_EXPERTS else common + golden
        batch = ["--train-iters", "1", "--global-batch-size", "32"]
        kernels = ["--transformer-impl", layout.transformer_impl]  # without a GPU the default is another
        jobs[f"found {number}"] = (16, " ".join([model, *batch, *flags(layout), *kernels]))
    argv = [{"argv": line.split(), "world_size": world_size} for world_size, line in jobs.values()]
    done = run_forked(Path(__file__).parent / "dry_run_worker.py", json.dumps(argv))
    assert done.returncode == 0, done.stdout[-6000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (*result, room) for name, result in zip(jobs, found, strict=True)}


@pytest.mark.parametrize("case", ["one process", "1,024 processes"])
def test_a_run_that_can_start_is_planned(case, ends):
    printed, end, room = ends[case]
    assert end is None, end
    packs = {"one process": 4, "1,024 processes": 256}[case]
    assert re.search(rf"train .*packs: {packs} packs read, \d+ samples", printed)
    assert f"{room}/golden/release: fits this model" in printed
    assert f"measured on {packs} packs" in printed and re.search(r"^fits: rank \d needs", printed, re.M)
    assert "nothing was found that would stop this run" in printed
    assert not (room / "events").exists() and not (room / "saved").exists()


def test_sharded_data_parallelism_is_planned(ends):
    printed, end, _ = ends["sharded data parallelism"]
    assert end is None, end
    assert "64 GPUs: TP 1, PP 1, CP 1, DP 64 with ZeRO-3; 1 micro-batches" in printed


def test_a_large_layout_is_planned_in_full(ends):
    printed, _, _ = ends["1,024 processes"]
    assert "1,024 GPUs: TP 2 with SP, PP 2, CP 1, DP 256; 1 micro-batches" in printed
    assert printed.count("pipeline rank 0") == printed.count("pipeline rank 1") == 1


def test_muon_is_planned_with_one_momentum(ends):
    printed, end, _ = ends["Muon"]
    assert end is None, end
    layout = Layout(data_parallel_size=8, use_distributed_optimizer=True, optimizer="muon")
    state = rank_state(PRESETS["neo-2b"], layout, 2, 0)
    assert state.optimizer < 0.8 * rank_state(PRESETS["neo-2b"], replace(layout, optimizer="adam"), 2, 0).optimizer
    (row,) = re.findall(r"^0 +embeddings .*", printed, re.M)
    assert row.split()[-4] == f"{state.optimizer / 1e9:.2f}"


def test_the_longest_packs_of_a_run_are_planned(ends):
    """The first of them are read too, and nothing is planned for those that a run does not come to."""
    printed, end, _ = ends["two lengths"]
    assert end is None, end
    for length in (192, 384):
        assert re.search(rf"^train .*/lengths.yaml: 4 packs of {length} tokens read, \d+ samples$", printed, re.M)
    assert re.search(r"^packs +384 tokens; ", printed, re.M)
    printed, end, _ = ends["the short ones"]
    assert end is None and "384 tokens" not in printed and re.search(r"^packs +192 tokens; ", printed, re.M)


def test_experts_are_planned(ends):
    printed, end, _ = ends["experts"]
    assert end is None, end
    assert "16 GPUs: TP 2 with SP, PP 1, CP 1, EP 4 x ETP 1, DP 8; 1 micro-batches" in printed
    assert "experts are planned for --moe-token-dispatcher-type alltoall" in printed
    assert "experts are planned" not in ends["one process"][0]


@pytest.mark.parametrize("number", range(len(FOUND + FOUND_EXPERTS)))
def test_layouts_of_the_search_can_start(number, ends):
    layout, (printed, end, _) = (FOUND + FOUND_EXPERTS)[number], ends[f"found {number}"]
    assert end is None, end
    assert f"16 GPUs: {layout_text(layout)}; {layout.micro_batches} micro-batches" in printed
    assert f"recomputation {recomputation_text(layout)}" in printed


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("damaged checkpoint", r"--pretrained-checkpoint .*/cut: .* bytes instead of \d+: copy or convert it again"),
        ("another model", r"the checkpoint .* is of another model \(ffn_hidden_size \d+ there, 128 here\)"),
        (
            "a border within a step",
            r"--mixture .*: pack 8 begins packs of 384 tokens after those of 192, in the middle",
        ),
        ("another length", r"--train-data-path .* holds packs of 192 tokens, --seq-length is 128"),
        (
            "experts that do not divide",
            r"--expert-model-parallel-size 4 with 1 tensor-parallel ranks of an expert does",
        ),
        ("no such layout", r"--tensor-model-parallel-size 4 .* needs a multiple of 4 processes, not 6"),
    ],
)
def test_errors_of_the_run_are_errors_of_the_dry_run(case, sentence, ends):
    _, end, _ = ends[case]
    assert re.match(f"pretrain_neo: {sentence}", str(end)), end
