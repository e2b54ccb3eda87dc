"""NEO's own flags, joined to Megatron's parser. Everything else keeps Megatron's name and meaning."""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Literal

from megatron.training.argument_utils import ArgumentGroupFactory


@dataclass
class NeoModelArguments:
    """Sizes of the model, and its pipeline stages."""

    neo_model: str = ""
    """Required. A preset (neo-2b, neo-9b, neo-ov-2b, neo-ov-9b, u1-8b, u1-a3b, tiny), or a directory or hub id with the
    config.json of a NEO in Hugging Face form, or a Megatron checkpoint: the sizes of the model. Megatron's size flags
    (--hidden-size, --num-layers, ...) change single ones."""

    pre_buffer_num_layers: int = 0
    """How many of --num-layers form the pre-buffer, 0 to all. Default: as in --neo-model."""

    patch_embedding_size: int = 0
    """Channels of the patch embedding, a multiple of 4. Default: as in --neo-model."""

    pre_buffer_pipeline_stages: int = 0
    """Puts the embeddings and the pre-buffer on this many pipeline stages of their own, virtual ones included; the
    layers of both parts are split by their costs. Default: Megatron's even split, or one by costs if the stages do not
    divide the layers. --pipeline-model-parallel-layout overrides both."""


@dataclass
class NeoTrainingArguments:
    """Training stage, optimizer state and the weight of samples."""

    training_stage: Literal[1, 2, 3] = 2
    """1: pre-training of the patch embedding, the pre-buffer and the h/w parts of the post-LLM; 2: mid-training and 3:
    SFT of all parameters. Sets learning rate, schedule and AdamW as in --recipe; Megatron's flags change single ones.
    Default: %(default)s."""

    recipe: Literal["kit", "paper", "neo-ov"] | None = None
    """Learning rate, schedule and AdamW of --training-stage. kit: AdamW and schedule of the public kit at the peak
    rates of NEO's paper; paper: table 5 of NEO's paper, with another beta2, lowest rate and warm-up; neo-ov: as far as
    NEO-ov's paper states them, and --min-lr is asked for (docs/training.md compares all). Default: neo-ov for neo-ov-2b
    and neo-ov-9b, else kit."""

    pretrained_optimizer: bool = False
    """Takes over the optimizer state of --pretrained-checkpoint for all parameters that were trained there, as from
    stage 1 to stage 2; others start with moments of zero. The schedule and the number of consumed packs restart.
    Default: off."""

    lr_scale: str = ""
    """Multiplies the learning rate of modules, as in "patch_embedding=2 post_llm=0.1". Names, and parts of them up to a
    dot, are those of the list of trained parameters that a start prints; of several that fit, the longest counts.
    Default: none."""

    unfreeze: str = ""
    """Trains modules that --training-stage 1 leaves frozen from a step on, as in "post_llm@2000": the first 2,000 steps
    do not change them. They take memory and time as if they trained from the beginning. Names are those of --lr-scale.
    Default: none."""

    balance_loss_coeff: float = 0.0
    """Coefficient, 0 or more, of SenseNova-U1's balance loss of experts, which counts image tokens and text apart and
    is a sum over layers; the cross entropy has the coefficient 1. As published: 0.05. Megatron's own losses are chosen
    by --moe-router-load-balancing-type. Default: 0, none."""

    on_bad_loss: Literal["stop", "skip"] = "stop"
    """Rule for a step whose loss or gradients are NaN or infinite, or whose loss jumps (--loss-jump). stop: the run
    ends before the weights change. skip: the step changes nothing, is named in the log and counted, and the run goes
    on; after ten such steps in a row it ends. Default: %(default)s."""

    loss_jump: float = 0.0
    """A loss is bad, too, if it lies more than this many standard deviations above the mean of the last 128 steps; 6
    finds spikes alone. Default: 0, no such limit."""

    loss_weighting: Literal["square", "sample", "token"] = "square"
    """Weight of each of the n trained tokens of a sample: 1/sqrt(n), 1/n or 1. Default: %(default)s."""

    mixture: str = ""
    """Trains on several directories of packs, in place of --train-data-path: a YAML file with their shares, which may
    change at given packs of the run, as may the length of packs (docs/data.md). Default: none."""

    max_broken_samples: float = 0.001
    """A sample whose image cannot be decoded gets the loss weight 0 and is named in the log. The run stops when such
    samples exceed this share, 0 to 1, of the samples that a rank has read (of 1,000 if it has read fewer). Default:
    %(default)s."""

    min_jpeg_quality: int = 100
    """Augmentation: every image is recompressed as JPEG with a quality drawn from this, 1 to 100, to 100. Needs data
    preprocessed with --image-store encoded. Default: 100, no augmentation."""


@dataclass
class NeoKernelArguments:
    """Kernels of a GPU."""

    attention_tiles: Literal["timed", "table"] = "timed"
    """Tiles of FlexAttention on a GPU, which decide its speed and the last bits of its results. timed: where several
    are worth it, rank 0 times them at the first start on such a GPU, in 1 to 3 minutes, and keeps the fastest in
    neo-megatron-tiles of XDG_CACHE_HOME or ~/.cache. table: those of docs/gpu.md, the same for every run; always so
    with --deterministic-mode. Default: %(default)s."""


@dataclass
class NeoDryRunArguments:
    """A check of the run without training."""

    dry_run: bool = False
    """Checks flags, layout, checkpoint and the packs of the first global batch, prints the plan of the run and exits
    before anything is built. One process is enough: WORLD_SIZE=1024 python -m neo_megatron.pretrain_neo ...
    --dry-run"""


@dataclass
class NeoLogArguments:
    """Output on the screen, and a tracker in addition to those of Megatron."""

    console_log: Literal["short", "full"] = "short"
    """short: the screen shows steps, validation, checkpoints and warnings, and all output of every rank is appended to
    logs/rank_NNNNN.log in --save. full, or without --save: the screen shows all output. Default: %(default)s."""

    mlflow_dir: str = ""
    """Directory of a local file store of MLflow, which gets all scalars as metrics, the arguments as parameters, and
    commit, versions, packs and layout as tags of a run in the experiment neo_megatron. Default: none."""


@dataclass
class NeoCheckpointArguments:
    """Checkpoints that a run keeps."""

    save_total_limit: int = 0
    """Keeps this many of the newest checkpoints in --save, 1 or more, and deletes older ones once a newer one is
    verified. Default: keeps all."""


def add_neo_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds a group of flags for each dataclass above."""
    ArgumentGroupFactory(NeoModelArguments).build_group(parser, "NEO model")
    ArgumentGroupFactory(NeoTrainingArguments).build_group(parser, "NEO training")
    ArgumentGroupFactory(NeoKernelArguments).build_group(parser, "NEO kernels")
    ArgumentGroupFactory(NeoCheckpointArguments).build_group(parser, "NEO checkpoints")
    ArgumentGroupFactory(NeoLogArguments).build_group(parser, "NEO log")
    ArgumentGroupFactory(NeoDryRunArguments).build_group(parser, "NEO dry run")
    return parser
