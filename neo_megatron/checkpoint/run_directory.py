"""The directory that a run saves into, as Megatron fills it: `iter_0000040` and a tracker file that names the newest.

Megatron writes the tracker last. From then on a checkpoint counts: what lies next to it and is newer was still being
written when the run ended, or belongs to progress that a user discarded. Nothing here needs Megatron.
"""

import os
import re
import shutil
from pathlib import Path

from neo_megatron.checkpoint.torch_dist import TRACKER, tracked

_ITERATION = re.compile(r"iter_([0-9]{7,})")
_DELETING, _SET_ASIDE = ".deleting", ".set-aside"


class RunDirectory:
    """Finds, names and removes the checkpoints of a run; ``root`` need not exist."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.tracker = self.root / TRACKER

    def path_of(self, iteration: int) -> Path:
        return self.root / f"iter_{iteration:07d}"

    def iterations(self) -> list[int]:
        """Iterations with a directory, newest first."""
        names = os.listdir(self.root) if self.root.is_dir() else []
        found = [int(match[1]) for name in names if (match := _ITERATION.fullmatch(name))]
        return sorted((n for n in found if self.path_of(n).is_dir()), reverse=True)

    def named(self) -> int | str | None:
        """The tracker's content: an iteration or "release"; `None` if it is missing or half-written."""
        return tracked(self.tracker) if os.path.lexists(self.tracker) else None

    def named_path(self) -> Path | None:
        """The directory that the tracker names, whether it is there or not."""
        named = self.named()
        if isinstance(named, int):
            return self.path_of(named)
        return self.root / named if named else None

    def name(self, iteration: int) -> None:
        """Makes the tracker name a checkpoint. A kill leaves the old or the new name."""
        partial = self.tracker.with_name(TRACKER + ".partial")
        partial.write_text(str(iteration))
        partial.replace(self.tracker)

    def candidates(self) -> list[Path]:
        """The checkpoints to try, in this order: what the tracker names and the iterations before it.

        A tracker that names nothing may be one whose writing was interrupted: all finished checkpoints are tried then.
        """
        named = self.named()
        if named == "release":
            return [self.named_path()]
        if isinstance(named, int) and self.path_of(named).is_dir():
            return [self.path_of(n) for n in self.iterations() if n <= named]
        return [self.path_of(n) for n in self.iterations() if self.is_finished(n)]

    def is_finished(self, iteration: int) -> bool:
        """Whether a save was completed: Megatron writes metadata.json after everything else in the directory."""
        last = self.path_of(iteration) / "metadata.json"
        return last.is_file() and last.stat().st_size > 0

    def clear_after(self, iteration: int) -> list[str]:
        """Makes room for a run that resumes from here, and gives a sentence for each checkpoint in its way.

        Megatron would save into what is there file by file, and a kill could then leave a mixture of two saves that
        looks complete. Unfinished saves are deleted; others a user may want, so they get another name.
        """
        for left in self.root.glob(f"iter_*{_DELETING}"):
            shutil.rmtree(left)
        sentences = []
        for n in self.iterations():
            if n <= iteration:
                break
            path = self.path_of(n)
            if self.is_finished(n) or n == self.named():
                aside = path.with_name(path.name + _SET_ASIDE)
                while aside.exists():
                    aside = aside.with_name(aside.name + "-")
                path.rename(aside)
                sentences.append(f"{path} is newer than the checkpoint to resume from: set aside as {aside.name}")
            else:
                self.delete(n)
                sentences.append(f"{path} was still being written when its run ended: deleted")
        return sentences

    def surplus(self, limit: int) -> list[int]:
        """Finished checkpoints beyond the newest ``limit``. What is newer than the tracker says is not counted."""
        named = self.named()
        finished = [n for n in self.iterations() if isinstance(named, int) and n <= named and self.is_finished(n)]
        return finished[limit:]

    def delete(self, iteration: int) -> None:
        """Renames before deleting, so that a kill does not leave a half-deleted checkpoint."""
        path = self.path_of(iteration)
        doomed = path.with_name(path.name + _DELETING)
        path.rename(doomed)
        shutil.rmtree(doomed)
