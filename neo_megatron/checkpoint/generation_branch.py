"""The generation branch of a published NEO-unify (SenseNova-U1): carried from one directory to another, never trained.

Each tensor keeps its type and every bit; one is in memory at a time.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.hf_directory import write_json
from neo_megatron.checkpoint.neo_directory import open_neo
from neo_megatron.checkpoint.published_config import of_generation
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes

# Published files do not tell the pre-buffer apart, and a training may have other limits of pixels.
_FREE = ("pre_buffer_layers", "post_llm_layers", "min_pixels", "max_pixels")
# Files of a tokenizer and settings, which are copied where they exist.
_COMPANIONS = (
    *("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"),
)


class GenerationBranch:
    """The branch in a directory of Hugging Face form.

    Args:
        directory: of the complete NEO-unify.
        sizes: of the understanding branch to which it is to be joined.

    Attributes:
        stored: what its tensors are.

    Raises:
        CheckpointError: it has none, or its understanding branch is of other sizes.
    """

    def __init__(self, directory: str | Path, sizes: NeoSizes) -> None:
        neo = open_neo(directory, token_ids=sizes.image_token_ids)
        names = [name for name in neo.source.shapes if of_generation(name)]
        if not names:
            raise CheckpointError(
                f"{directory} has no generation branch: give the NEO-unify that was trained, or leave it out"
            )
        here, there = dataclasses.asdict(sizes), dataclasses.asdict(neo.sizes)
        compared = [key for key in here if key not in _FREE]
        differing = [f"{key} {there[key]} (here {here[key]})" for key in compared if here[key] != there[key]]
        if sizes.num_layers != neo.sizes.num_layers:
            differing.append(f"{neo.sizes.num_layers} layers (here {sizes.num_layers})")
        if differing:
            raise CheckpointError(f"{directory} has {', '.join(differing)}: give the NEO-unify that was trained")
        self._directory, self._source = Path(directory), neo.source
        self.stored = [StoredTensor(name, neo.source.shapes[name], neo.source.dtype(name)) for name in sorted(names)]

    def values(self) -> Iterator[Tensor]:
        """The tensors, in the order of ``stored``."""
        return (self._source.read(tensor.name) for tensor in self.stored)

    def write_companions(self, output: Path) -> None:
        """Writes the published configuration and copies the files of the tokenizer."""
        write_json(output / "config.json", read_json(self._directory / "config.json"))
        for name in _COMPANIONS:
            if (self._directory / name).is_file():
                shutil.copyfile(self._directory / name, output / name)
