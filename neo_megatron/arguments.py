"""NEO's own flags, joined to Megatron's parser. Everything else keeps Megatron's name and meaning."""

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Literal

from megatron.training.argument_utils import ArgumentGroupFactory


@dataclass
class NeoModelArguments:
    """The model."""

    neo_model: str = ""
    """Required. Sizes: neo-2b, neo-9b, tiny, or a directory with the config.json of a NEO in Hugging Face form.
    Megatron's size flags (--hidden-size, --num-layers, ...) change single ones."""

    pre_buffer_num_layers: int = 0
    """How many of --num-layers form the pre-buffer. Default: as in --neo-model."""

    patch_embedding_size: int = 0
    """Channels of the patch embedding. Default: as in --neo-model."""

    pre_buffer_pipeline_stages: int = 0
    """Puts the embeddings and the pre-buffer on this many pipeline stages of their own (virtual ones count); both parts
    are cut by what their layers cost. Default: Megatron's even split, or one by costs where layers do not divide.
    --pipeline-model-parallel-layout overrides both."""


@dataclass
class NeoTrainingArguments:
    """The training."""

    training_stage: Literal[1, 2, 3] = 2
    """1 pre-training (the patch embedding, the pre-buffer and the h/w parts of the post-LLM train), 2 mid-training,
    3 SFT (all trains). Sets learning rate, schedule and AdamW as published; Megatron's flags change single ones."""

    pretrained_optimizer: bool = False
    """Takes over the optimizer's state of --pretrained-checkpoint for all parameters that were trained there, as from
    stage 1 to stage 2; others start with moments of zero. The schedule and the count of samples restart."""

    loss_weighting: Literal["square", "sample", "token"] = "square"
    """Weight of each of the n trained tokens of a sample: 1/sqrt(n), 1/n or 1."""

    max_broken_samples: float = 0.001
    """A sample whose image cannot be decoded gets the loss weight 0 and is named in the log. The run stops when they
    are more than this share of the samples that a rank has read (or of 1,000, where it has read fewer)."""

    min_jpeg_quality: int = 100
    """Augmentation, off at 100: every image is recompressed as JPEG with a quality drawn from here to 100. Needs
    data preprocessed with --image-store encoded."""


@dataclass
class NeoDryRunArguments:
    """The dry run."""

    dry_run: bool = False
    """Checks flags, layout, checkpoint and the packs of the first global batch, prints the plan of the run and exits
    before anything is built. One process will do: WORLD_SIZE=1024 python -m neo_megatron.pretrain_neo ... --dry-run"""


@dataclass
class NeoLogArguments:
    """The log."""

    console_log: Literal["short", "full"] = "short"
    """short: the screen shows steps, validation, checkpoints and warnings, and everything that any rank prints goes to
    logs/rank_NNNNN.log in --save, which every start of the run appends to. full, or without --save: all is printed."""


@dataclass
class NeoCheckpointArguments:
    """The checkpoints of a run."""

    save_total_limit: int = 0
    """Keeps this many checkpoints in --save, the newest, and deletes older ones once a newer one is verified.
    Default: all are kept."""


def add_neo_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Adds a group of flags for each dataclass above."""
    ArgumentGroupFactory(NeoModelArguments).build_group(parser, "NEO model")
    ArgumentGroupFactory(NeoTrainingArguments).build_group(parser, "NEO training")
    ArgumentGroupFactory(NeoCheckpointArguments).build_group(parser, "NEO checkpoints")
    ArgumentGroupFactory(NeoLogArguments).build_group(parser, "NEO log")
    ArgumentGroupFactory(NeoDryRunArguments).build_group(parser, "NEO dry run")
    return parser
