"""Recognises what a path holds, and says what to do if another kind of path is needed.

It checks file names and small JSON files next to them, so that a mistyped path is found before models and slow
libraries are loaded. Only the standard library is needed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from neo_megatron.checked_files import UnreadableFile, read_json
from neo_megatron.errors import DataError
from neo_megatron.redaction import credentials_refusal, has_credentials

REMOTE = ("s3://", "msc://")
_TRACKER = "latest_checkpointed_iteration.txt"
_ANNOTATIONS = (
    ".json",
    ".jsonl",
    ".parquet",
    ".arrow",
    ".tar",
    *(f".json{lines}.{packed}" for lines in ("", "l") for packed in ("gz", "zst")),
)
_IMAGES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_LARGEST_JSON = 1 << 29  # bytes
_MAX_NAMES = 1000  # names of a directory that are checked; one of images may have millions


class WrongPath(DataError, ValueError):
    """A path is of another kind than needed; the text is one sentence with the path and a remedy."""


class Kind(Enum):
    """The kinds of paths; the value follows the path in a message."""

    MISSING = "does not exist"
    EMPTY = "is an empty directory"
    SHARDS = "holds shards"
    PACKS = "holds packs"
    NO_MANIFEST = "holds a data set without its manifest.json"
    UNFINISHED_SHARDS = "holds an unfinished data set of neo-megatron preprocess"
    UNFINISHED_PACKS = "holds unfinished packs of neo-megatron pack"
    MEGATRON = "is a Megatron checkpoint"
    ITERATION = "is one iteration of a Megatron checkpoint"
    UNFINISHED_SAVE = "holds only unfinished checkpoints of a training run"
    NEO = "is a Hugging Face checkpoint of a NEO"
    QWEN3 = "is a Hugging Face checkpoint of a Qwen3"
    OTHER_MODEL = "is a Hugging Face checkpoint"
    PRE_BUFFER = "is a pre-buffer that extract-pre-buffer wrote"
    TOKENIZER = "holds a tokenizer without a model"
    ANSWERS = "holds answers of generate.py or evaluate.py"
    IMAGES = "is a directory of images"
    DIRECTORY = "is a directory of other files"
    ANNOTATIONS = "is an annotation file"
    YAML = "is a YAML file"
    IMAGE = "is an image file"
    FILE = "is a file, not a directory"


_FILES = frozenset({Kind.ANNOTATIONS, Kind.YAML, Kind.IMAGE, Kind.FILE})
_MODELS = frozenset({Kind.NEO, Kind.QWEN3, Kind.OTHER_MODEL})


class Wanted(Enum):
    """The kinds of paths that a flag accepts, with words for them in messages."""

    PACKS = "packs", {Kind.PACKS}
    SHARDS = "shards", {Kind.SHARDS}
    DATA_SET = "shards or packs", {Kind.SHARDS, Kind.PACKS}
    NEO = "a NEO in Hugging Face form", {Kind.NEO, Kind.OTHER_MODEL}  # published ones may have another model type
    QWEN3 = "a Qwen3", {Kind.QWEN3, Kind.OTHER_MODEL}
    MEGATRON = "a Megatron checkpoint", {Kind.MEGATRON, Kind.ITERATION}
    EITHER_FORM = "a checkpoint", {Kind.MEGATRON, Kind.ITERATION, Kind.PRE_BUFFER, *_MODELS}
    START = "a Megatron checkpoint", {Kind.MEGATRON}
    RUN = (
        "a run to resume",
        {Kind.MISSING, Kind.EMPTY, Kind.MEGATRON, Kind.UNFINISHED_SAVE, Kind.IMAGES, Kind.DIRECTORY},
    )
    FOLLOWED = "the directory of a run", {Kind.MISSING, Kind.EMPTY, Kind.MEGATRON, Kind.UNFINISHED_SAVE, Kind.DIRECTORY}
    SIZES = "a preset or a NEO", {Kind.NEO, Kind.OTHER_MODEL, Kind.MEGATRON, Kind.ITERATION}
    PRE_BUFFER = "a pre-buffer", {Kind.PRE_BUFFER}
    TOKENIZER = "a tokenizer", {Kind.TOKENIZER, *_MODELS}
    ANNOTATIONS = "an annotation file", {Kind.ANNOTATIONS, Kind.FILE}
    ANNOTATION_FILES = "annotation files", {Kind.ANNOTATIONS, Kind.FILE, Kind.DIRECTORY, Kind.IMAGES}
    REGISTRY = "a registry", {Kind.YAML, Kind.FILE}
    MIXTURE = "the schedule of a mixture", {Kind.YAML}
    IMAGE_ROOT = "the directory of the images", set(Kind) - _FILES - {Kind.MISSING}
    IMAGE = "an image file", {Kind.IMAGE, Kind.FILE}
    OUTPUT = "a directory to write to", set(Kind) - _FILES
    DATA_OUTPUT = "a directory or an address to write to", set(Kind) - _FILES

    def __init__(self, words: str, kinds: set[Kind]) -> None:
        self.words = words
        self.kinds = frozenset(kinds)


_OF_SOURCES = frozenset({Wanted.ANNOTATIONS, Wanted.ANNOTATION_FILES, Wanted.IMAGE_ROOT, Wanted.REGISTRY})
_HUB = frozenset({Wanted.NEO, Wanted.QWEN3, Wanted.EITHER_FORM, Wanted.SIZES, Wanted.TOKENIZER, Wanted.PRE_BUFFER})

_PREPROCESS = "run neo-megatron preprocess first"
_PACK = "run neo-megatron pack first"
_EXPORT = "export it first (neo-megatron convert megatron-to-hf)"
_CONVERT = "convert it first (neo-megatron convert hf-to-megatron)"
_MAKE_NEO = "make a NEO of it first (neo-megatron convert qwen3-to-neo)"
_COPY = "copy it again in full, or write it again"
_CONTINUE_SHARDS = "run the same neo-megatron preprocess command again, which continues it"
_CONTINUE_PACKS = "run the same neo-megatron pack command again"

# What to do with a path of one kind if another is needed.
_REMEDIES: dict[Wanted, dict[Kind, str]] = {
    Wanted.PACKS: {
        Kind.SHARDS: _PACK,
        Kind.ANNOTATIONS: "run neo-megatron preprocess and neo-megatron pack first",
        Kind.UNFINISHED_SHARDS: f"{_CONTINUE_SHARDS}, then neo-megatron pack",
        Kind.UNFINISHED_PACKS: _CONTINUE_PACKS,
        Kind.NO_MANIFEST: _COPY,
    },
    Wanted.SHARDS: {
        Kind.PACKS: "give the shards that they were packed from",
        Kind.ANNOTATIONS: _PREPROCESS,
        Kind.UNFINISHED_SHARDS: _CONTINUE_SHARDS,
        Kind.NO_MANIFEST: _COPY,
    },
    Wanted.DATA_SET: {
        Kind.ANNOTATIONS: _PREPROCESS,
        Kind.UNFINISHED_SHARDS: _CONTINUE_SHARDS,
        Kind.UNFINISHED_PACKS: _CONTINUE_PACKS,
        Kind.NO_MANIFEST: _COPY,
    },
    Wanted.NEO: {Kind.MEGATRON: _EXPORT, Kind.ITERATION: _EXPORT, Kind.QWEN3: _MAKE_NEO},
    Wanted.QWEN3: {
        Kind.NEO: "it has a pre-buffer already; give the Qwen3 to put one in front of",
        Kind.MEGATRON: "give the Qwen3 as it was downloaded",
    },
    Wanted.MEGATRON: {Kind.NEO: _CONVERT, Kind.OTHER_MODEL: _CONVERT, Kind.QWEN3: f"{_MAKE_NEO}, then hf-to-megatron"},
    Wanted.TOKENIZER: {
        kind: "give the --tokenizer that neo-megatron preprocess was given" for kind in (Kind.MEGATRON, Kind.ITERATION)
    },
    Wanted.SIZES: {Kind.QWEN3: _MAKE_NEO},
    Wanted.ANNOTATIONS: {Kind.YAML: "give a registry with --registry and --datasets"},
    Wanted.ANNOTATION_FILES: {Kind.YAML: "give a registry with --registry and --datasets"},
    Wanted.REGISTRY: {Kind.ANNOTATIONS: "give an annotation file with --input"},
    Wanted.MIXTURE: {Kind.PACKS: "give it as --train-data-path, or name it in a schedule"},
    Wanted.PRE_BUFFER: {
        kind: "take its pre-buffer out first (neo-megatron convert extract-pre-buffer)"
        for kind in (Kind.NEO, Kind.MEGATRON, Kind.ITERATION)
    },
}
_PARENT = "give the directory that contains it, with --ckpt-step for another iteration than the newest"
_REMEDIES[Wanted.START] = _REMEDIES[Wanted.MEGATRON] | {Kind.ITERATION: _PARENT}
_REMEDIES[Wanted.RUN] = {
    kind: f"{remedy} and give it as --pretrained-checkpoint" for kind, remedy in _REMEDIES[Wanted.MEGATRON].items()
} | {Kind.ITERATION: _PARENT}
_REMEDIES[Wanted.FOLLOWED] = {Kind.ITERATION: "give the directory that contains it"}

# For all other kinds.
_GIVE = {
    Wanted.PACKS: "give a directory that neo-megatron pack has written",
    Wanted.SHARDS: "give a directory that neo-megatron preprocess has written",
    Wanted.DATA_SET: "give a directory that neo-megatron preprocess or neo-megatron pack has written",
    Wanted.NEO: "give the directory of a NEO checkpoint in Hugging Face form, or its hub id",
    Wanted.QWEN3: "give the directory of a Qwen3 checkpoint, or its hub id",
    Wanted.MEGATRON: "give a directory that neo-megatron convert has written or --save has filled",
    Wanted.EITHER_FORM: "give the directory of a checkpoint, or its hub id",
    Wanted.START: "give a directory that neo-megatron convert has written or --save has filled",
    Wanted.RUN: "give the --save directory of the run",
    Wanted.FOLLOWED: "give the --save directory of the run",
    Wanted.SIZES: "give a preset (neo-2b, neo-9b, tiny), the directory of a NEO in either form, or a hub id",
    Wanted.PRE_BUFFER: "give a directory that extract-pre-buffer has written",
    Wanted.TOKENIZER: "give a directory with a tokenizer, or its hub id",
    Wanted.ANNOTATIONS: "give a JSON or JSONL file of records, Parquet, Arrow or a WebDataset tar",
    Wanted.ANNOTATION_FILES: "give a JSON or JSONL file of records, Parquet, Arrow or WebDataset tars",
    Wanted.REGISTRY: "give a YAML file of data sets",
    Wanted.MIXTURE: "give a .yaml file of phases with their shares",
    Wanted.IMAGE_ROOT: "give the directory that the records' image paths are relative to",
    Wanted.IMAGE: "give an image file",
    Wanted.OUTPUT: "choose another directory",
    Wanted.DATA_OUTPUT: "choose another directory",
}


def kind_of(path: str | Path) -> Kind:
    """The kind of a local path."""
    path = Path(path)
    if os.path.isfile(path):  # unlike the method of Path, False for a name that is too long
        return _kind_of_file(path)
    if not os.path.isdir(path):
        return Kind.MISSING
    names = {entry.name for entry in islice(path.iterdir(), _MAX_NAMES)}
    if not names:
        return Kind.EMPTY
    return _kind_of_data_set(path) or _kind_of_checkpoint(path, names) or _kind_of_other(names)


def _kind_of_file(path: Path) -> Kind:
    name = path.name.lower()
    if name.endswith(".json"):  # JSON is YAML too: a registry is an object, annotations are an array
        with path.open("rb") as file:
            return Kind.FILE if file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{") else Kind.ANNOTATIONS
    if name.endswith(_ANNOTATIONS):
        return Kind.ANNOTATIONS
    if name.endswith((".yaml", ".yml")):
        return Kind.YAML
    return Kind.IMAGE if name.endswith(_IMAGES) else Kind.FILE


def _kind_of_data_set(path: Path) -> Kind | None:
    files = {Kind.SHARDS: "00000.tokens.idx", Kind.PACKS: "patterns.npy"}
    known = next((kind for kind, file in files.items() if (path / file).is_file()), None)
    if (path / "manifest.json").is_file():
        # A directory with a damaged manifest is still recognised; the reader of the manifest reports the damage.
        formats = {"neo-shards": Kind.SHARDS, "neo-packs": Kind.PACKS}
        return formats.get(str(_json(path / "manifest.json").get("format")), known)
    if (path / "run.json").is_file():
        return Kind.UNFINISHED_SHARDS
    if (path / "neo-packs.partial").is_file():
        return Kind.UNFINISHED_PACKS
    return Kind.NO_MANIFEST if known else None


def _kind_of_checkpoint(path: Path, names: set[str]) -> Kind | None:
    if (path / "config.json").is_file():
        model_types = {"neo_chat": Kind.NEO, "qwen3": Kind.QWEN3, "neo_pre_buffer": Kind.PRE_BUFFER}
        return model_types.get(str(_json(path / "config.json").get("model_type")), Kind.OTHER_MODEL)
    if (path / _TRACKER).is_file():
        return Kind.MEGATRON
    if (path / "metadata.json").is_file():
        return Kind.ITERATION
    if any(re.fullmatch(r"(pytorch_)?model.*\.(safetensors|bin|index\.json)", name) for name in names):
        return Kind.OTHER_MODEL  # its reader reports that config.json is missing
    if any(re.fullmatch(r"iter_\d{7,}", name) for name in names):
        return Kind.UNFINISHED_SAVE
    return Kind.TOKENIZER if names & {"tokenizer.json", "tokenizer_config.json", "vocab.json"} else None


def _kind_of_other(names: set[str]) -> Kind:
    if names & {"answers.jsonl", "answers.partial.jsonl"}:
        return Kind.ANSWERS
    return Kind.IMAGES if any(name.lower().endswith(_IMAGES) for name in names) else Kind.DIRECTORY


def _json(path: Path) -> dict[str, Any]:
    """The contents of a small JSON file; ``{}`` if it is broken, which its reader reports."""
    if path.stat().st_size > _LARGEST_JSON:
        return {}
    try:
        return read_json(path)
    except UnreadableFile:
        return {}


def check_path(path: str | Path, wanted: Wanted, flag: str = "") -> None:
    """Checks that a local path is of the wanted kind. Object storage and hub ids are left to their readers.

    Args:
        path: to be checked.
        wanted: what is needed.
        flag: that the path was given to, for the message.

    Raises:
        WrongPath: the text has the path, its kind, and what to do.
    """
    text = str(path)
    if text.startswith(REMOTE) and has_credentials(text):
        raise WrongPath(f"{flag} {credentials_refusal(text)}".strip())
    if text.startswith(REMOTE) and wanted in _OF_SOURCES and _leaves(text):
        raise WrongPath(f"{flag} {text} has . or .. in it; write the address without".strip())
    if text.startswith(REMOTE) and wanted is not Wanted.OUTPUT:
        return
    if wanted in (Wanted.OUTPUT, Wanted.DATA_OUTPUT) and (reason := _unwritable(text)):
        raise WrongPath(f"{flag} {text} {reason}".strip())
    found = kind_of(path)
    elsewhere = wanted is Wanted.SIZES or (wanted in _HUB and text.count("/") == 1)  # a preset or a hub id
    elsewhere |= wanted is Wanted.ANNOTATION_FILES and has_magic(text)
    if found in wanted.kinds or (found is Kind.MISSING and elsewhere):
        return
    raise WrongPath(f"{flag} {wrong_kind(text, found, wanted)}".strip())


def _leaves(address: str) -> bool:
    return bool({".", ".."} & set(address.split("/")))


def _unwritable(text: str) -> str | None:
    """Why a directory, which need not exist, cannot be written to; `None` if it can."""
    if text.startswith(REMOTE):
        return "is object storage, to which only shards and packs are written: choose a directory of a file system"
    path = Path(text)
    if (link := _dangling(path)) is not None:
        return _leads_nowhere(path, link)
    existing = next(place for place in (path, *path.absolute().parents) if os.path.exists(place))
    if not os.path.isdir(existing):
        return None if existing == path else f"is below {existing}, which is a file: {_GIVE[Wanted.OUTPUT]}"
    if not os.access(existing, os.W_OK | os.X_OK):
        read_only = os.statvfs(existing).f_flag & os.ST_RDONLY
        reason = "is on a read-only file system" if read_only else f"cannot be written: no permission for {existing}"
        return f"{reason}: {_GIVE[Wanted.OUTPUT]}"
    return None


def _dangling(path: Path) -> Path | None:
    """The first broken link among a path and its parents; `None` if there is none."""
    places = (path, *path.absolute().parents)
    return next((place for place in places if os.path.islink(place) and not os.path.exists(place)), None)


def _leads_nowhere(path: Path, link: Path) -> str:
    place = "is" if link == path else f"is below {link},"
    return f"{place} a link that leads nowhere: create its target, or remove the link"


def output_place(path: str | Path, flag: str = "--output") -> Path:
    """The path of an output that appears by renaming; links are followed, as for any other output.

    Raises:
        WrongPath: the path or a parent is a broken link.
    """
    path = Path(path)
    if (link := _dangling(path)) is not None:
        raise WrongPath(f"{flag} {path} {_leads_nowhere(path, link)}")
    return path.resolve() if path.is_symlink() else path


def wrong_kind(location: str, found: Kind, wanted: Wanted) -> str:
    """The message about a location that is of another kind than needed."""
    what = found.value
    if found is Kind.MISSING and Path(f"{location}.partial").exists():
        return f"{location} does not exist, only {location}.partial, which is unfinished: run the same command again"
    if found not in (Kind.MISSING, Kind.EMPTY, Kind.FILE):
        what += f", not {wanted.words}"
    return f"{location} {what}: {_REMEDIES.get(wanted, {}).get(found) or _GIVE[wanted]}"


def check_flags(arguments: Sequence[str], flags: Mapping[str, Wanted]) -> None:
    """Checks the paths on a command line before it is parsed, which may need slow imports.

    Args:
        arguments: without the name of the program.
        flags: the flags that take paths. Abbreviated flags and those after ``--`` are checked only by their readers.

    Raises:
        WrongPath: as `check_path`.
    """
    flag = None
    for word in arguments:
        if word == "--":
            return
        value: str | None = word
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            value = value if equals else None
        if flag in flags and value:
            share = re.fullmatch(r"(.+)%[\d./]+", value)
            check_path(share[1] if share and not Path(value).exists() else value, flags[flag], flag)
