"""The checkpoints of a run, around Megatron's saving and loading and without changing them.

Megatron has no hook at the end of a save, which may come steps later when it is asynchronous. So every step looks
whether the tracker file, which Megatron writes last, has changed: one `stat` on rank 0.
"""

import threading
from argparse import Namespace

from neo_megatron.checkpoint.dcp_metadata import CHECKSUMS, write_checksums
from neo_megatron.checkpoint.integrity import stored_pieces, verify_pieces
from neo_megatron.checkpoint.run_directory import RunDirectory
from neo_megatron.errors import ConfigError, DamagedCheckpoint
from neo_megatron.paths import REMOTE
from neo_megatron.run.console import say
from neo_megatron.run.output_lock import OutputLock
from neo_megatron.run.ranks import on_rank_0, rank_and_ranks
from neo_megatron.run.resume import make_way, note_packs
from neo_megatron.run.start_checks import check_checkpoint


def check_save_flags(args: Namespace) -> None:
    """Refuses flags about checkpoints that contradict each other.

    Raises:
        ConfigError: with the flags and a remedy.
    """
    if args.ckpt_format != "torch_dist":
        raise ConfigError(
            f"--ckpt-format {args.ckpt_format}: only torch_dist can be verified and loaded on any layout: leave it out"
        )
    if args.ckpt_step and not args.load and not args.pretrained_checkpoint:
        raise ConfigError(f"--ckpt-step {args.ckpt_step} needs --load or --pretrained-checkpoint, in which it lies")
    for flag in ("load", "save", "pretrained_checkpoint"):
        if str(getattr(args, flag)).startswith(REMOTE):
            raise ConfigError(
                f"--{flag.replace('_', '-')} {getattr(args, flag)}: checkpoints are read and written on file systems "
                "alone: give a directory (a mounted bucket is one)"
            )
    if args.save_total_limit < 0:
        raise ConfigError(f"--save-total-limit {args.save_total_limit}: give 1 or more, or leave it out to keep all")
    if args.save_total_limit and args.save_retain_interval:
        raise ConfigError(
            "--save-total-limit and --save-retain-interval both say which checkpoints are deleted: give one of them"
        )


class RunCheckpoints:
    """Manages a run's checkpoints: the one to start from, checksums of saved ones, and which are kept.

    A context around training: on exit the last save gets its checksums, and the directory is released.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._directory = RunDirectory(args.save) if args.save else None
        self._limit = args.save_total_limit
        self._lock = OutputLock(args.save) if args.save else None
        self._started = False
        self._seen: tuple[int, int] | None = None
        self._deleting: threading.Thread | None = None

    def start(self) -> None:
        """Makes Megatron load a complete checkpoint. Called on all ranks before Megatron loads; later calls do nothing.

        Raises:
            ConfigError: another run saves into the same directory; no checkpoint is complete, or it is not of this run.
        """
        if self._started:
            return
        if self._lock is not None:
            on_rank_0(self._lock.acquire)
        note_packs(self._args)
        checkpoint = check_checkpoint(self._args, read_tensors=True)
        make_way(self._args, checkpoint)
        self._seen = self._stamp()
        self._started = True  # not before: the directory of a refused run must stay unchanged

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.look()
            self._finish(kind)
        finally:
            if self._lock is not None:
                self._lock.release()

    def _finish(self, kind: type[BaseException] | None) -> None:
        # A run that was told to stop may have little time left, and the next start deletes as well.
        if kind is None and self._deleting:
            self._deleting.join()
            self._delete_surplus()

    def look(self) -> None:
        """Writes checksums of a checkpoint that was finished since the last call, and deletes surplus ones.

        Raises:
            ConfigError: another run has taken the directory over.
        """
        if self._directory is None or not self._started or rank_and_ranks()[0] != 0:
            return
        self._lock.check()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        newest = self._directory.named()
        if not isinstance(newest, int):
            return
        try:
            write_checksums(self._directory.path_of(newest))
        except OSError as error:
            say(f"{self._directory.path_of(newest)} has no {CHECKSUMS}: {error}")
        if self._limit and not (self._deleting and self._deleting.is_alive()):
            # A thread, because a large directory on a shared file system takes minutes.
            self._deleting = threading.Thread(target=self._delete_surplus, daemon=True)
            self._deleting.start()

    def _delete_surplus(self) -> None:
        """Deletes old checkpoints if the newest, read back, is intact: otherwise an older one may be the last good."""
        surplus = self._directory.surplus(self._limit)
        if not surplus:
            return
        newest = self._directory.named_path()
        try:
            verify_pieces(stored_pieces(newest))
            for iteration in surplus:
                self._directory.delete(iteration)
        except (DamagedCheckpoint, OSError) as error:
            say(f"{error}: no older checkpoint is deleted until a later one is intact")

    def _stamp(self) -> tuple[int, int] | None:
        """A value that changes whenever the tracker is written."""
        if self._directory is None or not self._directory.tracker.exists():
            return None
        status = self._directory.tracker.stat()
        return status.st_mtime_ns, status.st_ino
