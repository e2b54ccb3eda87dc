"""What vLLM says to the settings of an engine that does not start; run by the Python of its environment.

    python settings.py CHECKPOINT SETTINGS.json ANSWERS.json

Settings are the arguments of `EngineArgs`; an answer is the text of the error, or null.
"""

import json
import sys
from pathlib import Path
from typing import Any

from vllm.engine.arg_utils import EngineArgs


def error_of(checkpoint: str, settings: dict[str, Any]) -> str | None:
    try:
        EngineArgs(model=checkpoint, dtype="float32", max_model_len=256, **settings).create_engine_config()
    except Exception as error:
        return str(error)
    return None


def main() -> None:
    checkpoint, settings, answers = sys.argv[1:]
    errors = [error_of(checkpoint, one) for one in json.loads(Path(settings).read_text())]
    Path(answers).write_text(json.dumps(errors))


if __name__ == "__main__":
    main()
