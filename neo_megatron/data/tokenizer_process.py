"""Loads a tokenizer in a process of its own, so that the libraries that read it do not stay in memory.

Run as a module, it prints the parts of the tokenizer of a directory as JSON.
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
    """``json`` the fast tokenizer as text, with NEO's tokens; ``ids`` its control tokens; ``size`` in tokens."""

    json: str
    ids: SpecialIds
    size: int


def load_parts(directory: str | Path) -> TokenizerParts:
    """Reads the tokenizer of a Hugging Face directory.

    transformers would take memory for the rest of the run, so another process reads the directory and ends; if this
    process has imported transformers already, it reads the directory itself.

    Raises:
        DataError: as `load_tokenizer`.
    """
    if "transformers" in sys.modules:
        return _load(directory)
    # In a session of its own: only this process gets Ctrl-C, and then ends that one. Its input ends with this process.
    command = [sys.executable, "-m", __name__, str(directory)]
    reader = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    with reader:
        try:
            printed = reader.stdout.read()
        except BaseException:
            reader.kill()
            raise
    if reader.returncode:
        raise DataError(f"the tokenizer in {directory} cannot be read; see the output of its library above")
    answer = json.loads(printed)
    if "error" in answer:
        raise DataError(answer["error"])
    return TokenizerParts(answer["json"], SpecialIds(**answer["ids"]), answer["size"])


def _load(directory: str | Path) -> TokenizerParts:
    tokenizer = load_tokenizer(directory)
    return TokenizerParts(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer), len(tokenizer))


def _end_with_input() -> None:
    """Ends this process with the one that reads its answer, which a signal may end at any moment."""
    os.read(sys.stdin.fileno(), 1)  # unbuffered: at its end Python would wait for the lock of a buffer
    os._exit(1)


def _main() -> None:
    threading.Thread(target=_end_with_input, daemon=True).start()
    # A tokenizer needs no torch, whose import takes four seconds. With None transformers considers it not installed,
    # and would warn about that.
    sys.modules["torch"] = None
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        answer = asdict(_load(sys.argv[1]))
    except DataError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
