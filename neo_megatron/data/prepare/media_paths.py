"""Resolves the paths of images and videos in records, and rejects those that lead out of the image root."""

import os
import posixpath
import re
from functools import lru_cache

from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.storage.base import is_remote

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")
_ARCHIVE = re.compile(r"\.(?:tar|tar\.\w+|tgz|tbz2|txz|zip|7z|rar)(?=/|$)", re.IGNORECASE)


def resolve_path(path: str, source: Source) -> str:
    """The path of an image or video with symbolic links resolved: the same for all spellings of a file.

    With an image root, nothing outside it can be reached by ``..``, an absolute path or a link; with
    ``source.follow_links``, links in the root may lead anywhere. Without a root, an absolute path is used as it is, and
    a relative one must stay in the directory of the annotations. A root may be an address, and so the result.

    Raises:
        RejectedSample: the path is remote, in an archive, or outside the root.
    """
    directory = source.image_root or os.path.dirname(source.annotations)
    if is_remote(directory) and not (os.path.isabs(path) and not source.image_root):
        return _resolve_address(path, directory.rstrip("/"))
    if _REMOTE.match(path):
        raise RejectedSample(Reason.REMOTE_PATH, f"{path!r:.200} is not a local file; download it first")
    root = _real_directory(os.path.join(os.getcwd(), directory))
    if any(not os.path.isdir(os.path.join(root, path[: match.end()])) for match in _ARCHIVE.finditer(path)):
        raise RejectedSample(Reason.ARCHIVE_PATH, f"{path!r:.200} is an archive or in an archive; unpack it first")
    found = os.path.join(root, path)
    directory, name = os.path.split(found)
    if name in ("", ".", "..") or os.path.islink(found):
        found = os.path.realpath(found)
    else:
        found = os.path.join(_real_directory(directory), name)
    confined = bool(source.image_root) or not os.path.isabs(path)
    if not confined or found.startswith(os.path.join(root, "")):
        return found
    link = _link_on_the_way(root, path, os.path.abspath(source.image_root or root))
    if link and source.follow_links:
        return found
    if link:
        raise RejectedSample(
            Reason.OUTSIDE_ROOT,
            f"{path!r:.200} is outside {root}, because {link} is a link to {os.path.realpath(link)}; "
            "trust the links in the root with --follow-links (follow_links: true in a registry)",
        )
    raise RejectedSample(
        Reason.OUTSIDE_ROOT, f"{path!r:.200} is outside {root}; correct the path, or --image-root (data_path)"
    )


def _resolve_address(path: str, root: str) -> str:
    """The address of a file below an address, without ``.`` and ``..``: object storage would take them for names."""
    relative = path.removeprefix(f"{root}/")
    if _REMOTE.match(relative):
        raise RejectedSample(
            Reason.REMOTE_PATH, f"{path!r:.200} is not below {root}; correct the path, or --image-root (data_path)"
        )
    found = posixpath.normpath(relative)
    if relative.endswith("/") or found in (".", "..") or found.startswith(("/", "../")):
        raise RejectedSample(
            Reason.OUTSIDE_ROOT, f"{path!r:.200} is outside {root}; correct the path, or --image-root (data_path)"
        )
    if _ARCHIVE.search(posixpath.basename(found)):
        raise RejectedSample(Reason.ARCHIVE_PATH, f"{path!r:.200} is an archive; unpack it first")
    return f"{root}/{found}"


def _link_on_the_way(root: str, path: str, written_root: str) -> str | None:
    """The first link on the way down from the root, if the path does not leave the root by itself; else ``None``.

    A ``..`` may undo a directory below the root, but not a link: the parent of its target is not in the root.
    """
    if os.path.isabs(path):
        base = next((base for base in (root, written_root) if path.startswith(os.path.join(base, ""))), None)
        if base is None:
            return None
        path = path[len(base) :]
    names: list[str] = []
    first = None
    for name in path.split("/"):
        if name == "..":
            if not names or os.path.islink(os.path.join(root, *names)):
                return None
            names.pop()
        elif name not in ("", "."):
            names.append(name)
            here = os.path.join(root, *names)
            if first is None and os.path.islink(here):
                first = here
    return first


@lru_cache(maxsize=1 << 14)
def _real_directory(path: str) -> str:
    """A directory with links resolved; cached, because it has many images and each part of a path is a system call."""
    return os.path.realpath(path)
