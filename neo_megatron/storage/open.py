"""Opens a location: a path of the local disk, or an address of object storage.

Modules for object storage are imported only when such an address is opened.
"""

from pathlib import Path

from neo_megatron.errors import DataError
from neo_megatron.redaction import credentials_refusal, has_credentials
from neo_megatron.storage.base import Directory, LocalDirectory, is_remote


def open_directory(location: str | Path) -> Directory:
    """The directory at a local path, at ``s3://bucket/prefix``, or at ``msc://profile/prefix``.

    Raises:
        DataError: the address has credentials in it.
    """
    if not is_remote(location):
        return LocalDirectory(location)
    if has_credentials(str(location)):
        raise DataError(credentials_refusal(str(location)))
    from neo_megatron.storage.object_storage import ObjectDirectory

    return ObjectDirectory(str(location))
