"""A tokenizer as the data path needs it, without the libraries that read it staying in memory.

Run as a module, it prints the parts of the tokenizer of a directory.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from neo_megatron.data.chat import SpecialIds, load_tokenizer, special_ids
from neo_megatron.errors import DataError


@dataclass(frozen=True)
class TokenizerParts:
    """The fast tokenizer as text, NEO's tokens included, its control tokens, and the number of its tokens."""

    json: str
    ids: SpecialIds
    size: int


def load_parts(directory: str | Path) -> TokenizerParts:
    """Reads the tokenizer of a Hugging Face directory.

    transformers takes memory for the whole run, so a process that ends reads the directory; where it is loaded
    already, this process does.

    Raises:
        DataError: as `load_tokenizer`.
    """
    if "transformers" in sys.modules:
        return _load(directory)
    # In a session of its own: Ctrl-C is for this process, which then ends that one. Its input ends with this process.
    command = [sys.executable, "-m", __name__, str(directory)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with reader:
        try:
            printed = reader.stdout.read()
        except BaseException:
            reader.kill()
            raise
    if reader.returncode:
        raise DataError(f"the tokenizer of {directory} cannot be read; what its library says stands above")
    answer = json.loads(printed)
    if "error" in answer:
        raise DataError(answer["error"])
    return TokenizerParts(answer["json"], SpecialIds(**answer["ids"]), answer["size"])


def _load(directory: str | Path) -> TokenizerParts:
    tokenizer = load_tokenizer(directory)
    return TokenizerParts(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer), len(tokenizer))


def _end_with_input() -> None:
    """The process that reads the answer may be ended by a signal at any moment."""
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock Python waits for at its end
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    # A tokenizer needs no torch, whose import takes four seconds; transformers takes it for not installed, and would
    # warn of what one cannot do without it.
    sys.modules["torch"] = None
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        answer = asdict(_load(sys.argv[1]))
    except DataError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
