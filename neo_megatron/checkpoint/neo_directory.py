"""Opens a NEO in Hugging Face form and checks that it is complete: sizes, tensors, and corrections of its config."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.hf_directory import INDEX, WEIGHTS, SafetensorsDirectory
from neo_megatron.checkpoint.names import LM_HEAD, WORD_EMBEDDING, check_shapes, hf_shapes
from neo_megatron.checkpoint.pickled_directory import open_weights
from neo_megatron.checkpoint.published_config import complete_config, of_generation
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.paths import Wanted, check_path


@dataclass(frozen=True)
class NeoDirectory:
    """A NEO in Hugging Face form, as `open_neo` returns it.

    Args:
        source: the tensors, every one of the table that is not missing and none besides, except for a tied head that
            repeats the embedding, and for the generation branch of a NEO-unify.
        config: `config.json`, completed.
        sizes: the same as `NeoSizes`.
        said: a sentence for every correction of the configuration.
        missing: names of the table that are not there, and may be.
    """

    source: SafetensorsDirectory
    config: dict[str, Any]
    sizes: NeoSizes
    said: list[str]
    missing: list[str]


def read_sizes(directory: str | Path) -> NeoSizes:
    """The sizes in `config.json`, completed from the tensors next to it, if any; reads headers only.

    Raises:
        CheckpointError: not the configuration of a NEO, or a broken file.
    """
    directory = Path(directory)
    config = read_json(directory / "config.json")
    if any(os.path.lexists(directory / name) for name in (WEIGHTS, INDEX)):
        config, _ = complete_config(config, SafetensorsDirectory(directory).shapes, directory)
    return sizes_of(config, directory)


def sizes_of(config: dict[str, Any], directory: Path) -> NeoSizes:
    """`NeoSizes.from_hf` with errors that name the file."""
    try:
        return NeoSizes.from_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{directory / 'config.json'}: {error}") from error


def open_neo(
    directory: str | Path,
    allow_pickle: bool = False,
    allow_missing: Sequence[str] = (),
    token_ids: Mapping[str, int] | None = None,
) -> NeoDirectory:
    """Reads headers and JSON only.

    Args:
        allow_pickle: take pickled weights where there are no safetensors, see `pickled_directory.py`.
        allow_missing: patterns of names that may be missing.
        token_ids: of image tokens, for a directory that does not tell.

    Raises:
        CheckpointError: not a NEO, or a tensor is missing, unexpected or of another shape; a file is broken.
    """
    directory = Path(directory)
    check_path(directory, Wanted.NEO)
    config = read_json(directory / "config.json")
    source = open_weights(directory, allow_pickle)
    config, said = complete_config(config, source.shapes, directory, token_ids)
    sizes = sizes_of(config, directory)
    found = source.shapes_with_tied_head(LM_HEAD, WORD_EMBEDDING, sizes.tie_word_embeddings)
    found = {name: shape for name, shape in found.items() if not of_generation(name)}
    missing = check_shapes(found, hf_shapes(sizes), str(directory), allow_missing)
    return NeoDirectory(source, config, sizes, said, missing)
