"""The ways that are compared; a peer that is not installed is told by its package."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from neo_megatron.benchmarks.peers.work import Loader, Work


@dataclass(frozen=True)
class Way:
    """A way from tars to packs.

    Args:
        title: in the table.
        adapter: module of this package, and its loader.
        package: on PyPI; "" for our own.
        module: that the package installs.
    """

    title: str
    adapter: tuple[str, str]
    package: str = ""
    module: str = "neo_megatron"

    @property
    def installed(self) -> bool:
        """Whether the package can be imported; a package of another project may have its first name."""
        parent = self.module.rpartition(".")[0]
        return bool((not parent or find_spec(parent)) and find_spec(self.module))

    @property
    def described(self) -> str:
        """The title with the version."""
        return f"{self.title} {version(self.package)}" if self.package else self.title

    def _of_adapter(self, name: str) -> Callable:
        return getattr(import_module(f"neo_megatron.benchmarks.peers.{self.adapter[0]}"), name)

    def open(self, directory: Path, work: Work) -> Loader:
        """The loader over the prepared form in a directory."""
        return self._of_adapter(self.adapter[1])(directory, work)

    def preparation(self) -> Callable[[Path, Path], None]:
        """The function that prepares the tars of a directory in another one; of peers."""
        return self._of_adapter("prepare")

    def load(self) -> None:
        """Imports the adapter, so that importing is not measured."""
        self._of_adapter(self.adapter[1])


_ours = partial(Way, adapter=("ours", "OurLoader"))
OURS = {
    "encoded": _ours("ours, `encoded`"),
    "reference": _ours("ours, `reference`"),
    "patches": _ours("ours, `patches`"),
}
PEERS = {
    "energon": Way("Megatron-Energon", ("energon", "EnergonLoader"), "megatron-energon", "megatron.energon"),
    "mosaic": Way("MosaicML Streaming", ("mosaic", "MosaicLoader"), "mosaicml-streaming", "streaming"),
    "webdataset": Way("WebDataset", ("tars", "TarLoader"), "webdataset", "webdataset"),
    "datasets": Way("Hugging Face datasets", ("hugging_face", "StreamingLoader"), "datasets", "datasets"),
}
WAYS = OURS | PEERS
