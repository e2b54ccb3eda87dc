"""The sizes of a model that is named on a command line: by a preset, a directory or a hub id."""

from neo_megatron.checkpoint.hub import config_directory
from neo_megatron.errors import ConfigError
from neo_megatron.model.config import NeoSizes
from neo_megatron.paths import Wanted, check_path
from neo_megatron.presets import SIZES


def sizes_of(name_or_directory: str) -> NeoSizes:
    """The sizes of a preset, or those of a NEO in either form.

    Args:
        name_or_directory: a preset, the directory of a checkpoint or a hub id.

    Raises:
        ConfigError: it is none of these, or its sizes are not those of a NEO.
    """
    if name_or_directory in SIZES:
        return SIZES[name_or_directory]
    try:
        directory = config_directory(name_or_directory)
        if directory.exists():
            check_path(directory, Wanted.SIZES)
            # Imported here: these bring torch.
            from neo_megatron.checkpoint.neo_directory import read_sizes
            from neo_megatron.checkpoint.reader import is_megatron, saved_sizes
            from neo_megatron.checkpoint.torch_dist import TorchDistDirectory

            if is_megatron(directory):
                return saved_sizes(TorchDistDirectory(directory))
            if (directory / "config.json").is_file():
                return read_sizes(directory)
    except ValueError as error:
        raise ConfigError(f"--neo-model {name_or_directory}: {error}") from error
    raise ConfigError(
        f"--neo-model {name_or_directory}: neither a preset ({', '.join(SIZES)}) nor a directory with a config.json "
        "nor a Megatron checkpoint nor a hub id"
    )
