"""Trains NEO.

    python -m neo_megatron.launch --nproc-per-node 8 -m neo_megatron.pretrain_neo --neo-model neo-2b \
        --training-stage 1 --train-data-path PACKS ...

docs/flags.md says which flags of Megatron are accepted; `arguments.py` has those that NEO adds. `launch` takes the
flags of torchrun, which can be used instead; a single process needs no launcher.
"""

import sys

from neo_megatron.command_line import sentence_of
from neo_megatron.errors import ConfigError, DataError
from neo_megatron.run.failure import Failure
from neo_megatron.run.progress import progress
from neo_megatron.run.start import PROGRAM, check_paths, open_console, stand_alone


def main() -> None:
    """Trains; ends the process with one sentence for an error that the user can remedy."""
    arguments = sys.argv[1:]
    try:
        stand_alone(arguments)
    except ConfigError as error:
        sys.exit(f"{PROGRAM}: {error}")
    failure = Failure(PROGRAM)
    try:
        check_paths(arguments)
        failure.console = open_console(arguments)
        failure.watch()
        progress.end_by(lambda sentence: failure.tell(DataError(sentence), sentence))
        from neo_megatron.run.pretraining import train  # takes seconds, and prepares torch and Megatron for the machine

        train()
    except KeyboardInterrupt:
        failure.interrupted()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            failure.tell(stop, stop.code.removeprefix(f"{PROGRAM}: "))
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        failure.tell(error, sentence_of(error))


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # the process that saves in the background, which unpickles objects of Megatron
    from neo_megatron.megatron_compat import cpu_platform

    cpu_platform.install_training()
