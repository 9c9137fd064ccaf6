"""Files that are whole at every moment: written beside their place, flushed, and renamed, the folder flushed too."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from horen_bench.errors import UserError

# What a file system says that has no such thing as flushing a folder, as some network file systems have not.
_NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes its place, flushed to the disk first.

    Raises:
        UserError: the disk is full or not writable; what was at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        make_folder(path.parent)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        _remove_if_there(temporary)


def _remove_if_there(temporary: Path) -> None:
    """A temporary file that cannot be removed is swept by a later run; the error that matters is another."""
    try:
        temporary.unlink(missing_ok=True)
    except OSError:
        return


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, so that a power cut afterwards leaves them there."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        flush_folder(folder.parent)


def flush_folder(path: Path) -> None:
    """Put a folder's list of names on the disk, where the file system has that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FLUSH:
            raise
    finally:
        os.close(descriptor)


def unreadable(path: Path, error: OSError) -> UserError:
    """The sentence about a file that the disk does not give; whether it is damaged nobody knows."""
    return UserError(
        f"{path}: it cannot be read ({error.strerror or error}); see to the disk and run the same command again, what "
        "is finished is kept"
    )


def unwritable(path: Path, error: OSError | SafetensorError) -> UserError:
    """The sentence about a place that cannot be written."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
    what = "the disk is full" if full else f"it cannot be written ({error})"
    advice = "free some space" if full else "mend that, or choose another place with results_dir="
    return UserError(f"{path}: {what}; {advice} and run the same command again, what is finished is kept")
