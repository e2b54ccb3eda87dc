"""The command line of a training: sizes and choices reach the run, Megatron's refusals are sentences, --help helps."""

import importlib.util
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from support.paths import ROOT
from support.processes import run_forked

from neo_megatron.errors import ConfigError
from neo_megatron.run import training_arguments
from neo_megatron.run.training_arguments import choose_gpu

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")


@pytest.fixture
def parse(parse):
    """Of a run of ten steps."""
    return lambda flags: parse(f"--train-iters 10 {flags}")


def test_size_flags_change_the_preset(parse):
    sizes = parse(
        "--num-layers 6 --hidden-size 96 --ffn-hidden-size 160 --num-attention-heads 4 --num-query-groups 1 "
        "--kv-channels 24 --norm-epsilon 1e-5 --max-position-embeddings 400 --untie-embeddings-and-output-weights"
    ).neo_sizes
    assert {name: sizes[name] for name in ("pre_buffer_layers", "post_llm_layers", "hidden_size")} == {
        "pre_buffer_layers": 2,
        "post_llm_layers": 4,
        "hidden_size": 96,
    }
    assert (sizes["ffn_hidden_size"], sizes["num_attention_heads"], sizes["num_query_groups"]) == (160, 4, 1)
    assert (sizes["head_dim"], sizes["norm_epsilon"], sizes["max_positions"]) == (24, 1e-5, 400)
    assert not sizes["tie_word_embeddings"]


def test_choices_reach_megatron(parse):
    args = parse("--optimizer sgd --dataloader-type external --transformer-impl local --distributed-backend gloo")
    assert (args.optimizer, args.transformer_impl, args.distributed_backend) == ("sgd", "local", "gloo")


def test_embedding_and_head_have_a_schedule_of_their_own(parse):
    from megatron.training.training import get_megatron_optimizer_config

    _, overrides = get_megatron_optimizer_config(parse("--decoupled-lr 1e-2 --decoupled-min-lr 1e-3"))
    assert {"max_lr": 1e-2, "min_lr": 1e-3} in overrides.values()


def test_maxima_of_fp8_make_no_data_parallel_rank_wait(parse):
    from megatron.training.argument_utils import core_transformer_config_from_args

    from neo_megatron.model.transformer_config import NeoConfig

    args = parse("")
    config = core_transformer_config_from_args(args, NeoConfig)
    assert config.tp_only_amax_red
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    assert not args.stream_ckpt_dequant, "a scale of its own for each piece of a stored parameter"


def test_gloo_groups_are_for_the_flag_that_uses_them(parse):
    assert not parse("").use_gloo_process_groups
    flags = "--use-distributed-optimizer --distrib-optim-fully-reshardable-mem-efficient"
    assert parse(flags).use_gloo_process_groups


@pytest.mark.parametrize(("rank", "gpus", "chosen"), [(3, 1, 0), (3, 8, 3), (0, 1, 0)])
def test_a_process_that_sees_one_gpu_takes_it(rank, gpus, chosen):
    args = Namespace(local_rank=rank)
    choose_gpu(args, gpus)
    assert args.local_rank == chosen


def test_too_few_gpus_for_the_processes_of_a_machine_end_in_a_sentence():
    with pytest.raises(ConfigError, match="LOCAL_RANK=3, but this process sees 2 GPUs"):
        choose_gpu(Namespace(local_rank=3), 2)


def test_weights_and_biases(parse, monkeypatch, tmp_path):
    """The arguments that its package gets at the start."""
    from megatron.training import global_vars

    wandb, told = ModuleType("wandb"), {}
    wandb.__spec__ = ModuleSpec("wandb", None)  # the start looks for it
    wandb.init = lambda **settings: told.update(settings)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(global_vars, "_GLOBAL_WANDB_WRITER", None)
    args = parse(f"--wandb-project neo --wandb-exp-name first --wandb-save-dir {tmp_path}/wandb --wandb-entity us")
    global_vars._set_wandb_writer(args)
    assert (told["project"], told["name"], told["entity"]) == ("neo", "first", "us")
    assert told["dir"] == f"{tmp_path}/wandb" and told["config"]["lr"] == 4e-5


@pytest.mark.parametrize(
    ("flags", "package", "bounds"),
    [
        ("--wandb-project neo --wandb-exp-name first --wandb-save-dir x", "wandb", ">=0.31,<1"),
        ("--mlflow-dir x", "mlflow", "-skinny>=3,<4"),
    ],
)
def test_a_tracker_that_is_not_installed_is_named(parse, monkeypatch, flags, package, bounds):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    remedy = re.escape(f"needs the package {package}, which is not installed: pip install '{package}{bounds}'")
    with pytest.raises(ConfigError, match=remedy):
        parse(flags)


def test_a_tracker_that_nobody_has_logged_in_to_is_refused(parse, monkeypatch, tmp_path):
    """By its package itself, without a network."""
    pytest.importorskip("wandb")
    from megatron.training import global_vars

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(training_arguments, "set_global_variables", global_vars._set_wandb_writer)
    with pytest.raises(ConfigError, match="--wandb-project: No API key configured.*WANDB_MODE=offline"):
        parse(f"--wandb-project neo --wandb-exp-name first --wandb-save-dir {tmp_path}")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--fp16 --bf16", "Megatron does not take these flags together: it asks for `not args."),
        ("--num-experts 8", "--num-experts 8: experts belong to the sizes of a model"),
        ("--yaml-cfg run.yaml", "--yaml-cfg run.yaml: a run is configured by flags"),
        ("--enable-msc", "--enable-msc: s3:// and msc:// addresses"),
        ("--use-checkpoint-args", "--use-checkpoint-args: a run takes its sizes from --neo-model"),
        ("--data-path shards", "--data-path shards: packs are made by neo-megatron preprocess"),
        ("--log-memory-to-tensorboard --tensorboard-dir x", "--log-memory-to-tensorboard needs a GPU"),
        ("--profile", "--profile needs --use-pytorch-profiler on this machine"),
        ("--distributed-backend nccl", "--distributed-backend nccl needs GPUs"),
        ("--save-interval 10", "--save-interval 10 is for --save: add it, or leave --save-interval out"),
        ("--save x --async-save --async-strategy nvrx", "needs the package nvidia-resiliency-ext"),
        (
            "--optimizer sgd --use-distributed-optimizer",
            "--use-distributed-optimizer shards the state of --optimizer adam alone: leave one of them out",
        ),
        ("--attention-tiles table", "--attention-tiles chooses a kernel of a GPU"),
        *(
            (
                f"--attention-tiles table --attention-backend {one}",
                f"for FlexAttention, not for --attention-backend {one}",
            )
            for one in ("flash", "unfused")
        ),
        ("--optimizer muon --muon-num-ns-steps 0", "--muon-num-ns-steps 0: give 1 or more"),
        ("--optimizer muon --muon-momentum 1", "--muon-momentum 1.0: give a number from 0 to below 1"),
        ("--optimizer muon --muon-extra-scale-factor 0", "--muon-extra-scale-factor 0.0: give a number above 0"),
        (
            "--optimizer muon --bf16 --fp8-format hybrid",
            "--fp8-format hybrid is not for --optimizer muon: leave one of",
        ),
        ("--optimizer muon --use-megatron-fsdp", "--use-megatron-fsdp is not for --optimizer muon: leave one of them"),
        ("--no-such-flag", "unrecognized arguments: --no-such-flag; --help lists all flags"),
    ],
)
def test_invalid_command_lines_end_in_one_sentence(parse, flags, sentence):
    with pytest.raises(ConfigError) as refused:
        parse(flags)
    assert str(refused.value).startswith(sentence) or sentence in str(refused.value)


def test_muon_needs_its_package(parse, monkeypatch):
    assert parse("--optimizer muon").muon_tp_mode == "duplicated"
    monkeypatch.setitem(sys.modules, "emerging_optimizers", None)
    with pytest.raises(
        ConfigError, match="--optimizer muon needs the package emerging_optimizers, which is not installed"
    ):
        parse("--optimizer muon")


def test_flags_without_effect_are_reported(parse, capsys):
    parse("--use-mcore-models --attention-softmax-in-fp32 --no-rope-fusion")
    said = capsys.readouterr().out
    assert "--use-mcore-models has no effect here: deprecated in Megatron" in said
    assert "--attention-softmax-in-fp32 has no effect here: NEO's softmax is always in float32" in said
    assert "--no-rope-fusion has" not in said, "the default on a machine without a GPU"


@pytest.mark.slow
def test_help_begins_with_neos_flags():
    done = run_forked("-m", "neo_megatron.pretrain_neo", "--help", environment={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout[-2000:]
    usage, text = done.stdout[done.stdout.index("usage:") :].split("\n\n", 1)
    assert len(usage.splitlines()) < 5, "in short"
    assert text.index("--neo-model") < text.index("--training-stage") < text.index("--micro-batch-size")
    assert "--tensor-model-parallel-size" in text
    assert "--num-experts" not in text and "docs/flags.md" in text, "what a start refuses is in the page"


@pytest.fixture
def train_sh(tmp_path, monkeypatch) -> Callable[..., dict[str, str]]:
    """Flags of the command that train.sh starts, told by a python of our own."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("OUTPUT", "run")

    def start(flags: str = "", packs: str = "packs") -> dict[str, str]:
        monkeypatch.setenv("PACKS", packs)
        words = ["bash", ROOT / "examples" / "train.sh", "neo-2b", "1", *flags.split()]
        started = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        return {word: value for word, value in zip(started, [*started[1:], ""], strict=True) if word.startswith("--")}

    return start


@pytest.mark.parametrize(("packs", "flag"), [("a/b", "train-data-path"), ("a/b.yaml", "mixture"), ("b.yml", "mixture")])
def test_train_sh_takes_packs_or_a_mixture(train_sh, packs, flag):
    started = train_sh(packs=packs)
    assert {name: started[name] for name in ("--train-data-path", "--mixture") if name in started} == {
        f"--{flag}": packs
    }


@pytest.mark.parametrize(
    ("own", "expected"), [(None, "expandable_segments:True"), ("backend:native", "backend:native")]
)
def test_gpu_memory_is_in_segments_that_grow(train_sh, tmp_path, monkeypatch, own, expected):
    """Unless the user says otherwise."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "--memory $PYTORCH_ALLOC_CONF"\n')
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    if own:
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", own)
    assert train_sh() == {"--memory": expected}


@pytest.mark.parametrize(
    ("flags", "given", "left_out"),
    [
        ("", "--train-iters 10000 --global-batch-size 128", "--train-samples"),
        ("--train-samples 500", "--train-samples 500 --global-batch-size 128", "--train-iters"),
        ("--train-samples=500", "--global-batch-size 128 --train-samples=500", "--train-iters"),
        ("--step-batch-size-schedule 0:8 --train-samples 9", "--step-batch-size-schedule 0:8", "--global-batch-size"),
        ("--train-iters 7", "--train-iters 7", "--train-samples"),
    ],
)
def test_flags_win_over_what_train_sh_sets(train_sh, flags, given, left_out):
    """The last of two equal flags counts."""
    last = train_sh(flags)
    words = given.split()
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag.startswith("--"):
            assert flag in last and (value.startswith("--") or last[flag] == value), flag
    assert not any(flag.startswith(left_out) for flag in last)
