"""Files that are written whole or not at all, and files that notice any damage done to them later."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Calls ``write(file)`` on a temporary neighbour of ``path``, flushes it to the disk, then renames it over ``path``.

    After a crash or an exception there is the old file or the new one, never half of one, and no temporary left by us.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)  # of a process of that number that was killed; or a link that somebody has put there
        with open(partial, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        move_over(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def move_over(source: Path, target: Path) -> None:
    """Renames ``source``, whose bytes are on the disk, to ``target`` in the same folder, in place of what is there, for good."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that do this to files only; the rename is done
            raise
    finally:
        os.close(folder)


# What ends a sealed file: these bytes, then the SHA-256 of everything before them. Behind, not before: whoever reads files of
# the kind inside (a zip archive is found from its end, what follows is skipped) can read the sealed one as well.
_SEAL = b"\ngrasp_sparse sha256 "
_SEAL_BYTES = len(_SEAL) + hashlib.sha256().digest_size


class FolderInUse(OSError):
    """Another process holds the folder."""


@contextlib.contextmanager
def locked_folder(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Inside, no other process gets past this with the same folder. The lock ends with the process, however that ends.

    A file system that has no locks is used without.

    Raises:
        FolderInUse: another process is inside.
    """
    with open(Path(folder) / ".lock", "ab", opener=_no_link) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: forked workers would go on holding it
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise FolderInUse(errno.EAGAIN, "another process is using this folder", os.fspath(folder)) from error
        yield


def _no_link(path: str, flags: int) -> int:
    """Opens a file that we write into, but not through a link: a folder that came from somebody may hold one to anywhere."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


class DamagedFile(ValueError):
    """A sealed file does not hold what was written; the message says what is wrong with it, without its name."""


def write_sealed(path: str | os.PathLike[str], data: bytes | memoryview) -> None:
    """Writes ``data`` and its SHA-256 as one file, as :func:`write_atomically` does."""
    seal = _SEAL + hashlib.sha256(data).digest()
    write_atomically(path, lambda file: (file.write(data), file.write(seal)))


def read_sealed(path: str | os.PathLike[str]) -> bytes:
    """The whole file that :func:`write_sealed` wrote, seal included.

    The seal tells damage, not malice: whoever changes a file on purpose can seal it again.

    Raises:
        DamagedFile: bytes are missing or changed, or the file was never sealed.
        OSError: it cannot be read at all.
    """
    found = Path(path).read_bytes()
    data, seal = memoryview(found)[:-_SEAL_BYTES], found[-_SEAL_BYTES:]
    if len(found) < _SEAL_BYTES or not seal.startswith(_SEAL):
        raise DamagedFile(f"its end is missing or changed, {len(found):,} bytes are left")
    if hashlib.sha256(data).digest() != seal[len(_SEAL) :]:
        raise DamagedFile("its bytes are not those that were written, the SHA-256 differs")
    return found
