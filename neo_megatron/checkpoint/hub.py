"""Models by their hub id, as `org/name` or `org/name@revision`: the files that are needed, in huggingface_hub's cache.

`HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_OFFLINE` have their usual meaning. Nothing downloaded is run, and
pickled weights are not even fetched unless asked for.
"""

# Libraries are imported only when a hub is used: local directories, the usual case, need none of them.
from pathlib import Path

from neo_megatron.errors import HubError
from neo_megatron.paths import Wanted, check_path

CONFIG = "config.json"
# Which of these exist depends on the age of the tokenizer.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja"),
)


def model_directory(name: str, allow_pickle: bool = False) -> Path:
    """A local directory, or the cached weights, configuration and tokenizer of a model on a hub.

    Raises:
        HubError: neither; no access; no network and not in the cache; no safetensors there.
    """
    if (local := _local(name)) is not None:
        return local
    from neo_megatron.checked_files import read_json
    from neo_megatron.checkpoint.hf_directory import INDEX, WEIGHTS
    from neo_megatron.checkpoint.pickled_directory import PICKLED_INDEX, PICKLED_WEIGHTS
    from neo_megatron.checkpoint.published_config import code_files

    directory = _fetch(name, (CONFIG,))
    # Code is fetched only to tell whether it exists: a mislabelled checkpoint names code that does not.
    code = code_files(read_json(directory / CONFIG).get("auto_map"))
    weights = (WEIGHTS, INDEX, "model-*-of-*.safetensors")
    directory = _fetch(name, (CONFIG, "generation_config.json", *TOKENIZER_FILES, *code, *weights))
    if not any((directory / file).exists() for file in (WEIGHTS, INDEX)):
        if not allow_pickle:
            raise HubError(
                f"{name}: no safetensors weights there; pickled ones are fetched with --allow-pickle only, "
                "and then loaded without anything that could run"
            )
        directory = _fetch(name, (PICKLED_WEIGHTS, PICKLED_INDEX, "pytorch_model-*-of-*.bin"))
    return directory


def tokenizer_directory(name: str) -> Path:
    """A local directory, or the cached tokenizer of a model on a hub; errors as above."""
    local = _local(name)
    if local is not None:
        check_path(local, Wanted.TOKENIZER)
    return _fetch(name, (CONFIG, *TOKENIZER_FILES)) if local is None else local


def config_directory(name: str) -> Path:
    """A local directory, or the cached `config.json` of a model on a hub; errors as above."""
    local = _local(name)
    return _fetch(name, (CONFIG,)) if local is None else local


def _local(name: str) -> Path | None:
    """The path, unless it can only be the id of a model: a directory wins over a model of the same name."""
    path = Path(name)
    if path.exists() or name.count("/") != 1:
        return path
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name.partition("@")[0])
    except HFValidationError:
        return path
    return None


def _fetch(name: str, files: tuple[str, ...]) -> Path:
    """Fetches those of the files that the model has; offline, those in the cache."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise HubError(f"{name}: its owners must grant access: request it on its page, then set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{name}: the model has no revision {revision}: leave it out for the main one") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{name}: neither a directory here nor a model on {constants.ENDPOINT}: check the spelling, or set "
            "HF_TOKEN if the model is private"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise HubError(
            f"{name}: no directory here, and {constants.ENDPOINT} did not give it ({_first_line(error)}): "
            "connect, or download the model elsewhere and give its directory"
        ) from error


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]
