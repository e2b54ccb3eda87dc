"""Verifies that a torch_dist checkpoint is as it was written: every file present, complete and unchanged.

Tensors need no checksums of ours. Each piece is an archive of `torch.save`, a zip whose records carry a CRC-32 that
torch writes and never compares when it reads. `.metadata` says where each piece begins and ends, so that ranks can
share the reading. What `.metadata` itself says is covered by `checksums.json`, written once a save is final.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from neo_megatron.checked_files import read_json
from neo_megatron.checkpoint.dcp_metadata import AGAIN, read_metadata
from neo_megatron.checkpoint.streaming import FileWindow
from neo_megatron.errors import DamagedCheckpoint

_TORCH_ZIP_FLAGS = 0x808  # sizes after the data, names in UTF-8


class Piece(NamedTuple):
    """Position of one stored piece of a tensor, or of one object; ``shape`` is None for an object."""

    path: Path
    offset: int
    length: int
    shape: tuple[int, ...] | None


def stored_pieces(directory: Path) -> list[Piece]:
    """All pieces of a checkpoint in file order, after the checks that read no tensor.

    A checkpoint without `checksums.json` passes, as every one does that was saved by other programs or whose run was
    killed between Megatron's last file and ours.

    Raises:
        DamagedCheckpoint: a file is missing, longer or shorter than its pieces, or a metadata file has changed since
            it was written.
    """
    if not directory.is_dir():
        raise DamagedCheckpoint(f"{directory} is missing")
    try:
        if read_json(directory / "metadata.json").get("sharded_backend") != "torch_dist":
            raise DamagedCheckpoint(f"{directory / 'metadata.json'} does not name the format torch_dist")
        metadata = read_metadata(directory)
    except ValueError as error:
        raise DamagedCheckpoint(str(error).removesuffix(AGAIN)) from error  # callers name another remedy
    shapes = {
        (key, tuple(piece.offsets)): tuple(piece.sizes)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
        for piece in entry.chunks
    }
    pieces = [
        Piece(directory / place.relative_path, place.offset, place.length, shapes.get((index.fqn, index.offset)))
        for index, place in metadata.storage_data.items()
    ]
    pieces = sorted({piece[:3]: piece for piece in pieces}.values(), key=lambda piece: piece[:3])
    ends = dict.fromkeys((piece.path for piece in pieces), 0)
    for piece in pieces:
        if piece.offset != ends[piece.path] or piece.length <= 0:
            raise DamagedCheckpoint(f"{directory / '.metadata'} leaves gaps in {piece.path.name}")
        ends[piece.path] += piece.length
    for path, end in ends.items():
        if path.stat().st_size != end:
            raise DamagedCheckpoint(f"{path} has {path.stat().st_size} bytes instead of {end}")
    return pieces


def share_of(pieces: Sequence[Piece], rank: int, ranks: int) -> list[Piece]:
    """The consecutive pieces that one of several ranks verifies, with about as many bytes for each rank."""
    total = sum(piece.length for piece in pieces)
    mine, before = [], 0
    for piece in pieces:
        middle = before + piece.length / 2
        if int(middle / total * ranks) == rank:
            mine.append(piece)
        before += piece.length
    return mine


def verify_pieces(pieces: Sequence[Piece]) -> None:
    """Reads pieces and compares every record with its checksum.

    Raises:
        DamagedCheckpoint: one of them holds other bytes than were written.
    """
    for path in dict.fromkeys(piece.path for piece in pieces):
        with path.open("rb") as file:
            for piece in pieces:
                if piece.path == path and (what := _damage(FileWindow(file, piece.offset, piece.length), piece)):
                    end = piece.offset + piece.length
                    raise DamagedCheckpoint(f"{path} is damaged between bytes {piece.offset} and {end} ({what})")


def _damage(archive: FileWindow, piece: Piece) -> str | None:
    """Describes the damage of an archive of `torch.save`; `None` if every record is as it was written."""
    try:
        torch._C.PyTorchFileReader(archive)  # compares the parts of the table of contents; zipfile leaves some unread
        with zipfile.ZipFile(archive) as records:
            for record in records.infolist():
                plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == record.file_size
                if not plain or record.flag_bits != _TORCH_ZIP_FLAGS or record.volume or record.comment:
                    return f"{record.filename} is not as torch.save writes it"
            wrong = records.testzip()
        if piece.shape is not None and not wrong:
            archive.seek(0)
            shape = tuple(torch.load(archive, map_location="meta", weights_only=True).shape)
            if shape != piece.shape:
                return f"it holds a tensor of shape {shape} instead of {piece.shape}"
    except Exception as error:  # damaged bytes can make the readers raise anything
        return str(error).split("\n")[0].split(". ")[0]
    return wrong and f"the checksum of {wrong} differs"
