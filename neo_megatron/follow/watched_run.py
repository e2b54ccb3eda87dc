"""The checkpoints of a run that is followed, and what they say of its trackers. Only reads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_megatron.checkpoint.run_directory import RunDirectory
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.errors import NeoError

_TEXTS = ("save", "tensorboard_dir", "mlflow_dir", "wandb_project", "wandb_entity")


@dataclass(frozen=True)
class RunFacts:
    """Arguments of the run, as its newest checkpoint has them; "" for a tracker that is off.

    Args:
        train_iters: steps after which the run ends; ``None`` if it does not say.
        save: its --save.
        tensorboard_dir, mlflow_dir: directories as they were given.
        wandb_project, wandb_entity: of Weights & Biases.
        wandb_dir: the directory that Weights & Biases fills.
    """

    train_iters: int | None
    save: str
    tensorboard_dir: str
    mlflow_dir: str
    wandb_project: str
    wandb_entity: str
    wandb_dir: str

    @classmethod
    def of(cls, arguments: Any) -> "RunFacts":
        """The facts of the arguments in a checkpoint, which may be anything."""

        def text(name: str) -> str:
            value = getattr(arguments, name, None)
            return value if isinstance(value, str) else ""

        iterations = getattr(arguments, "train_iters", None)
        texts = {name: text(name) for name in _TEXTS}
        wandb_dir = text("wandb_save_dir") or str(Path(texts["save"]) / "wandb")
        return cls(iterations if type(iterations) is int else None, **texts, wandb_dir=wandb_dir)


class WatchedRun:
    """The directory that a run saves into; it need not exist yet."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._directory = RunDirectory(root)

    def path_of(self, step: int) -> Path:
        return self._directory.path_of(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first: finished, and not newer than the tracker file says.

        Raises:
            CheckpointError: the tracker file is not a file.
        """
        named = self._directory.named()
        if not isinstance(named, int):  # none yet, or it is being written
            return []
        return [step for step in reversed(self._directory.iterations()) if step <= named and self.is_complete(step)]

    def is_complete(self, step: int) -> bool:
        """Whether a checkpoint is there: it may be deleted at any moment, as by --save-total-limit."""
        return self.stamp(step) is not None

    def stamp(self, step: int) -> int | None:
        """When a checkpoint was finished, in nanoseconds; ``None`` if it is not there or not finished."""
        try:
            status = (self.path_of(step) / "metadata.json").stat()
        except OSError:
            return None
        return status.st_mtime_ns if status.st_size else None

    def facts(self, steps: Sequence[int]) -> RunFacts | None:
        """The facts that the newest readable one of these checkpoints has."""
        for step in sorted(steps, reverse=True):
            try:
                return RunFacts.of(TorchDistDirectory(self.path_of(step)).common_state().get("args"))
            except (NeoError, OSError):  # damaged or deleted, which its export says
                continue
        return None
