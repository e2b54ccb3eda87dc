"""The commands of `neo-megatron`: their modules, and the flags whose paths are checked before slow imports."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from neo_megatron.paths import Wanted


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        module: its module; ``main()`` reads ``sys.argv``.
        summary: a line for `neo-megatron --help`.
        paths: flags that take paths, and what must exist there.
        interrupted: message after Ctrl-C.
        starts_itself: ``main()`` checks paths and reports errors by itself.
    """

    module: str
    summary: str
    paths: Mapping[str, Wanted] = field(default_factory=dict)
    interrupted: str = ""
    starts_itself: bool = False


_ANNOTATIONS = {"--input": Wanted.ANNOTATIONS, "--image-root": Wanted.IMAGE_ROOT, "--output": Wanted.OUTPUT}
_CONTINUES = "the same command continues"

COMMANDS = {
    "preprocess": Command(
        "neo_megatron.cli.preprocess",
        "tokenize annotations and check images: writes shards",
        {
            **_ANNOTATIONS,
            "--output": Wanted.DATA_OUTPUT,
            "--input": Wanted.ANNOTATION_FILES,
            "--registry": Wanted.REGISTRY,
            "--tokenizer": Wanted.TOKENIZER,
        },
        _CONTINUES,
    ),
    "pack": Command(
        "neo_megatron.cli.pack",
        "pack the samples of shards into sequences of one length: writes indices",
        {"--data": Wanted.SHARDS, "--output": Wanted.DATA_OUTPUT},
    ),
    "verify-data": Command(
        "neo_megatron.cli.verify_data", "read every byte of shards or packs", {"--data": Wanted.DATA_SET}
    ),
    "inspect": Command(
        "neo_megatron.cli.inspect",
        "show a pack and the statistics of a data set as an HTML page",
        {"--packs": Wanted.PACKS, "--data": Wanted.SHARDS, "--tokenizer": Wanted.TOKENIZER},
    ),
    "convert": Command(
        "neo_megatron.cli.convert",
        "convert checkpoints between Qwen3, NEO in Hugging Face form and Megatron",
        {
            "--qwen3": Wanted.QWEN3,
            "--hf": Wanted.NEO,
            "--neo": Wanted.EITHER_FORM,
            "--megatron": Wanted.MEGATRON,
            "--pre-buffer": Wanted.PRE_BUFFER,
            "--tokenizer": Wanted.TOKENIZER,
            "--output": Wanted.OUTPUT,
        },
    ),
    "verify-checkpoint": Command(
        "neo_megatron.cli.verify_checkpoint", "compare two forms of a checkpoint layer by layer"
    ),
    "plan": Command(
        "neo_megatron.cli.plan",
        "estimate memory and time of a parallel layout, or search for the best one",
        {"--neo-model": Wanted.SIZES, "--packs": Wanted.PACKS},
    ),
    "pretrain": Command("neo_megatron.pretrain_neo", "train on one process, or as a rank of torchrun", {}, "", True),
    "generate": Command(
        "neo_megatron.cli.generate",
        "answer one prompt, or all prompts of a file",
        {**_ANNOTATIONS, "--image": Wanted.IMAGE, "--model": Wanted.NEO},
    ),
    "evaluate": Command(
        "neo_megatron.cli.evaluate",
        "answer the questions of annotation files and score the answers",
        {**_ANNOTATIONS, "--registry": Wanted.REGISTRY, "--model": Wanted.NEO},
        _CONTINUES,
    ),
    "follow": Command(
        "neo_megatron.cli.follow",
        "export and evaluate every checkpoint of a run while it trains",
        {**_ANNOTATIONS, "--registry": Wanted.REGISTRY, "--tokenizer": Wanted.TOKENIZER},
        _CONTINUES,
    ),
    "demo": Command(
        "neo_megatron.cli.demo", "serve a page to query a checkpoint and see its attention", {"--model": Wanted.NEO}
    ),
    "benchmark": Command("neo_megatron.cli.benchmark", "measure speed next to what it is compared to"),
}
