"""Megatron-Energon: `energon prepare` on the tars, a task encoder with its packing hooks, and its savable loader."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.energon import (
    CaptioningSample,
    Sample,
    TaskEncoder,
    WorkerConfig,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.tools.prepare import command

from neo_megatron.benchmarks.peers import work as shared

PACKING_BUFFER = 256  # samples


def prepare(tars: Path, directory: Path) -> None:
    """Links the tars into a directory and indexes them there."""
    directory.mkdir()
    for tar in tars.glob("*.tar"):
        (directory / tar.name).hardlink_to(tar)
    fields = '{"image": "jpg", "caption": "txt"}'
    command.main(
        [str(directory), "--non-interactive", "--no-progress", "--num-workers", "1", "--split-ratio", "1,0,0"]
        + ["--sample-type", "CaptioningSample", "--field-map", fields],
        standalone_mode=False,
    )


@edataclass
class Tokenized(Sample):
    """A sample in the packing buffer: its image is still a file."""

    image: bytes
    tokens: Any
    grid: tuple[int, int]


@edataclass
class Encoded(Sample):
    """A sample of a pack, or a pack."""

    content: Any


class Encoder(TaskEncoder):
    """Tokenizes before packing and decodes afterwards, so that the packing buffer holds files instead of pixels."""

    decoder = None

    def __init__(self, work: shared.Work) -> None:
        self._work = work

    @stateless
    def preencode_sample(self, sample: CaptioningSample) -> Tokenized:
        grid = self._work.grid(shared.header(sample.image))
        tokens = self._work.tokens(grid, sample.caption.decode())
        return Tokenized.derive_from(sample, image=sample.image, tokens=tokens, grid=grid)

    def select_samples_to_pack(self, samples: list[Tokenized]) -> list[list[Tokenized]]:
        """The greedy knapsack of Megatron's multimodal example: the longest sample that fits, until none does."""
        rest = sorted(samples, key=lambda sample: len(sample.tokens))
        packs: list[list[Tokenized]] = []
        while rest:
            pack, room = [], self._work.length
            for number in range(len(rest) - 1, -1, -1):
                if len(rest[number].tokens) <= room:
                    pack.append(rest.pop(number))
                    room -= len(pack[-1].tokens)
            packs.append(pack)
        return packs

    @stateless
    def postencode_sample(self, sample: Tokenized) -> Encoded:
        number = int(sample.__key__.rpartition("/")[2])
        content = self._work.encoded(number, sample.tokens, sample.grid, shared.header(sample.image))
        return Encoded.derive_from(sample, content=content)

    @stateless
    def pack_selected_samples(self, samples: list[Encoded]) -> Encoded:
        return Encoded.derive_from(samples[0], content=self._work.pack([sample.content for sample in samples]))


class EnergonLoader:
    """A `work.Loader` over the prepared tars."""

    def __init__(self, directory: Path, work: shared.Work) -> None:
        dataset = get_train_dataset(
            directory,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            batch_size=None,
            packing_buffer_size=PACKING_BUFFER,
            shuffle_buffer_size=shared.SHUFFLE_BUFFER,
            max_samples_per_sequence=100,
            task_encoder=Encoder(work),
            repeat=False,
        )
        self._loader = get_savable_loader(dataset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for pack in self._loader:
            yield pack.content

    def save(self, path: Path) -> None:
        torch.save(self._loader.save_state_rank(), path)

    def restore(self, path: Path) -> None:
        self._loader.restore_state_rank(torch.load(path, weights_only=False))  # written by `save`
