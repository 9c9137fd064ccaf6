"""SHA-256 of whole files; that of a large one is remembered, so that a model of many gigabytes starts fast again."""

import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch

from horen_bench.errors import UserError
from horen_bench.results.atomic import write_text

Entry = list[Any]  # a stamp and a hash, as in JSON

_LARGE = 1 << 24  # bytes; a smaller file is read again, which takes a hundredth of a second
_SETTLED = 2 * 10**9  # ns; what changed more recently may change again without another time stamp
_THREADS = 4  # hashing leaves the interpreter's lock


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file's hash and what it was the hash of.

    Attributes:
        place: the path without links.
        stamp: size, times of the last change of content and of the entry (ns), inode: another one after each change.
        sha256: hex digits.
        lasting: large, and unchanged for long enough that the stamp can be trusted.
    """

    place: str
    stamp: list[int]
    sha256: str
    lasting: bool


def sha256_of(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file, hex digits.

    Raises:
        OSError: a file cannot be read.
    """
    known = _remembered()
    with ThreadPoolExecutor(_THREADS) as pool:
        hashed = list(pool.map(lambda path: _hashed(path, known), files))
    fresh: dict[str, Entry] = {file.place: [file.stamp, file.sha256] for file in hashed if file.lasting}
    if any(known.get(place) != entry for place, entry in fresh.items()):
        _remember({place: entry for place, entry in known.items() if Path(place).exists()} | fresh)
    return [file.sha256 for file in hashed]


def cache_file() -> Path:
    """Where hashes are remembered: one small JSON file in the user's cache folder."""
    return Path(pooch.os_cache("horen_bench")) / "file_hashes.json"


def _hashed(path: Path, known: dict[str, Entry]) -> HashedFile:
    place, stamp, now = str(path.resolve()), _stamp(path), time.time_ns()
    lasting = stamp[0] >= _LARGE and now - max(stamp[1:3]) > _SETTLED
    entry = known.get(place)
    if lasting and entry is not None and entry[0] == stamp:
        return HashedFile(place, stamp, str(entry[1]), lasting)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return HashedFile(place, stamp, digest, lasting and _stamp(path) == stamp)


def _stamp(path: Path) -> list[int]:
    """The second time cannot be set by hand: it gives away an edit that kept size and first time."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _remembered() -> dict[str, Entry]:
    """What is known by place; nothing where the file is missing or damaged, and hashed again then."""
    try:
        stored = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = stored.items() if isinstance(stored, dict) else ()
    return {place: entry for place, entry in entries if _is_entry(entry)}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str) and len(entry[1]) == 64


def _remember(entries: dict[str, Entry]) -> None:
    try:
        write_text(cache_file(), json.dumps(entries, indent=0))
    except UserError:
        return  # of a folder that cannot be written: the next start hashes again
