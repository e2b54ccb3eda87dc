"""A file inside a container, such as an image in a tar: it may stand wherever a record has the path of an image.

JSON can never produce one except from a ``data:`` URI, so a record cannot reach into a container that is not its own.
"""

import base64
import os
import re
from dataclasses import dataclass

from neo_megatron.data.image import read_image
from neo_megatron.data.image_limits import MAX_FILE_BYTES
from neo_megatron.data.prepare.file_identity import identity_of_path
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import open_source, read_source
from neo_megatron.storage.source_files import MissingObject

_DATA_URI = re.compile(r"data:image/[\w.+-]{1,40};base64,", re.ASCII)


@dataclass(frozen=True)
class StoredFile:
    """A file inside a container; its text is "NAME in CONTAINER", for messages.

    Args:
        container: path or address of the file that holds it.
        name: in the container; only a label, never a path that is opened.
        data: its bytes; ``None`` if they are read from the container.
        offset: in bytes, of its first byte in the container.
        length: in bytes.
        version: of a container in object storage, see `source_files.SourceState`.
    """

    container: str
    name: str
    data: bytes | None = None
    offset: int = 0
    length: int = 0
    version: str = ""

    def __str__(self) -> str:
        return f"{self.name!r:.200} in {self.container}"

    def __repr__(self) -> str:
        return f"<{self}>"  # without its bytes, because messages show values of records

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            RejectedSample: it is too large, which is found before it is read, or the container cannot be read.
            DataError: the container is in object storage, and cannot be read or has changed.
        """
        if (self.length if self.data is None else len(self.data)) > MAX_FILE_BYTES:
            raise RejectedSample(
                Reason.DECOMPRESSION_BOMB, f"the image {self} has over {MAX_FILE_BYTES >> 20} MiB; reduce it"
            )
        if self.data is not None:
            return self.data
        try:
            with open_source(self.container, self.version) as file:
                data = file.pread(self.length, self.offset)
        except OSError as error:
            raise RejectedSample(
                Reason.MISSING_IMAGE, f"the image {self} cannot be read ({error.strerror}); correct its path"
            ) from error
        if len(data) < self.length:
            raise RejectedSample(Reason.UNREADABLE_IMAGE, f"the image {self} is cut off; copy the container again")
        return data


MediaFile = str | StoredFile
"""An image or a video of a record: a path, or a file inside a container."""


def image_bytes(image: MediaFile) -> bytes:
    """The bytes of the file of an image.

    Raises:
        RejectedSample: it is missing, too large, or cannot be read.
        DataError: it is in object storage, and the server cannot be read from.
    """
    if isinstance(image, StoredFile):
        return image.read()
    return _read_object(image) if is_remote(image) else read_image(image)


def _read_object(address: str) -> bytes:
    try:
        data = read_source(address, MAX_FILE_BYTES)
    except MissingObject as error:
        raise RejectedSample(Reason.MISSING_IMAGE, f"the image {address} does not exist; correct its path") from error
    if len(data) > MAX_FILE_BYTES:
        raise RejectedSample(
            Reason.DECOMPRESSION_BOMB, f"the image {address} has over {MAX_FILE_BYTES >> 20} MiB; reduce it"
        )
    return data


def identity_of_place(file: MediaFile, content: int) -> int:
    """Identity of a file by where it is; by its ``content`` for one that has no place of its own."""
    if isinstance(file, str):
        return identity_of_path(file)
    container = file.container if is_remote(file.container) else os.path.realpath(file.container)
    return content if file.data is not None else identity_of_path(f"{container}\0{file.name}")


def of_data_uri(text: str, container: str) -> StoredFile | None:
    """The image in a ``data:image/...;base64,`` URI; ``None`` for any other text.

    Raises:
        RejectedSample: it is too large, which is found before it is decoded, or not base64.
    """
    if not (match := _DATA_URI.match(text)):
        return None
    if (len(text) - match.end()) // 4 * 3 > MAX_FILE_BYTES:
        raise RejectedSample(
            Reason.DECOMPRESSION_BOMB, f"the data: URI {text!r:.60} has over {MAX_FILE_BYTES >> 20} MiB; reduce it"
        )
    try:
        data = base64.b64decode(text[match.end() :].encode("ascii"), validate=True)
    except ValueError as error:
        raise RejectedSample(Reason.UNREADABLE_IMAGE, f"the data: URI {text!r:.60} is not base64 ({error})") from error
    return StoredFile(container, text[: match.end() - 1], data)
