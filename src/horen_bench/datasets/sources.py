"""Getting the published files: what `data/manifest.yaml` lists, downloaded, checked, put in place as a whole.

A file gets its final name only when it is known to be whole: its size and checksum are the published ones, or, where
nobody has published them, it has the length that the server gave and is a JSON list of records.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import requests
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError as HubHTTPError  # type: ignore[attr-defined]  # also lost connections
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from horen_bench.datasets.records import read_records
from horen_bench.errors import UserError
from horen_bench.paths import resource
from horen_bench.results.atomic import flush_folder, make_folder

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without an answer
_COMMIT = re.compile("[0-9a-f]{40}")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the manifest.

    Attributes:
        file: where it goes, below the data folder.
        url: where it is, or None for a file of a hub dataset.
        hub: dataset repository on huggingface.co, or None.
        hub_file: its name there.
        revision: commit of the hub repository; None takes the newest.
        sha256: of its content, or None where nobody has published it.
        git_blob: id of the file in the publisher's git repository, or None.
        n_bytes: its size, or None where it is not known.
        licence: as stated at the source, or "not stated".

    A source with neither `url` nor `hub` is known by its checksum alone: the user gets it by other means.

    Raises:
        UserError: a name leads out of its folder.
    """

    file: str
    url: str | None = None
    hub: str | None = None
    hub_file: str | None = None
    revision: str | None = None
    sha256: str | None = None
    git_blob: str | None = None
    n_bytes: int | None = None
    licence: str = "not stated"

    def __post_init__(self) -> None:
        for name in (self.file, *([] if self.hub_file is None else [self.hub_file])):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.name:
                raise UserError(
                    f"data/manifest.yaml: the file name {name!r} must be a path below the data folder, without '..'; "
                    "correct it there"
                )

    @property
    def origin(self) -> str:
        """Where it comes from, in words."""
        if self.url:
            return self.url
        return f"hub: {self.hub}" if self.hub else "no download is known"

    @property
    def has_checksum(self) -> bool:
        """Whether its content can be told from any other."""
        return bool(self.sha256 or self.git_blob)

    @property
    def can_change(self) -> bool:
        """Whether the publisher can put another file there: neither a commit nor a checksum pins it."""
        return not self.has_checksum and _COMMIT.search(self.revision or self.url or "") is None


class _NotTheFile(Exception):  # noqa: N818 - a reason, turned into a sentence where the source and the place are known
    """Why some content is not that of a source."""


def manifest() -> dict[str, list[Source]]:
    """Every downloadable file, by dataset."""
    content: Any = OmegaConf.to_container(OmegaConf.load(resource("data") / "manifest.yaml"))
    return {name: [Source(**entry) for entry in entries] for name, entries in content.items()}


def git_blob_id(content: bytes) -> str:
    """The id that git gives a file of this content, 40 hex digits."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def fetch(dataset: str, data_dir: Path, console: Console) -> list[Path]:
    """Download the files of a dataset that are not there yet, and check those that are.

    A download that was interrupted goes on where it stopped, if the file is still the same at the source.

    Raises:
        UserError: no such dataset, no connection, a server's refusal, or a file that is not the published one.
    """
    sources = manifest()
    if dataset not in sources:
        raise UserError(f"{dataset} is not in the manifest; it has {', '.join(sources)}")
    return [_fetched(source, data_dir / source.file, console) for source in sources[dataset]]


def _fetched(source: Source, place: Path, console: Console) -> Path:
    try:
        if place.exists():
            _check_present(source, place)
            console.print(f"{place} is there already", highlight=False, markup=False)
            return place
        make_folder(place.parent)
        if source.hub:
            _from_hub(source, place)
        else:
            _from_url(source, place, console)
        content = place.read_bytes()
    except (requests.RequestException, HubHTTPError, OSError, _NotTheFile) as error:
        raise UserError(
            f"{source.origin} cannot be downloaded ({' '.join(str(error).split())[:240]}); get it by other means and "
            f"put it at {place}"
        ) from error
    sha256 = hashlib.sha256(content).hexdigest()
    console.print(f"{place}: {len(content):,} bytes, sha256 {sha256}", highlight=False, markup=False, soft_wrap=True)
    return place


def _check_present(source: Source, place: Path) -> None:
    try:
        _check(place, source)
    except _NotTheFile as error:
        raise UserError(
            f"{place} is there already, but is not the published file ({error}); move it away and run the same command "
            "again, or read it under another name with dataset.path="
        ) from error


def _check(path: Path, source: Source) -> None:
    """See that a file is that of the source.

    Raises:
        _NotTheFile: another size, another checksum, or, where no checksum is published, no JSON list of records.
    """
    size = path.stat().st_size
    if source.n_bytes is not None and size != source.n_bytes:
        raise _NotTheFile(f"it has {size:,} bytes, and the published file {source.n_bytes:,}")
    content = path.read_bytes()
    actual = {"sha256": hashlib.sha256(content).hexdigest(), "git blob id": git_blob_id(content)}
    for name, published in (("sha256", source.sha256), ("git blob id", source.git_blob)):
        if published and actual[name] != published:
            raise _NotTheFile(f"its {name} is {actual[name]}, and that of the published file {published}")
    if not source.has_checksum:
        _check_records(path)


def _check_records(path: Path) -> None:
    try:
        records = read_records(path, "")
    except UserError as error:
        reason = str(error).removeprefix(str(path)).strip(" :;")
        raise _NotTheFile(f"it is no JSON list of records: {reason}") from error
    if not all(isinstance(record, dict) for record in records):
        raise _NotTheFile("it is a JSON list, but not of objects")


# --- The hub -----------------------------------------------------------------------------------------------


def _from_hub(source: Source, place: Path) -> None:
    """A file of a hub dataset; huggingface_hub resumes it and shows its own progress.

    The hub's metadata give size and checksum: of a large file the SHA-256, of another one the id of the git blob.
    """
    repository, name = str(source.hub), str(source.hub_file)
    metadata = get_hf_file_metadata(hf_hub_url(repository, name, repo_type="dataset", revision=source.revision))
    staging = place.with_name(f".{place.name}.part")
    cached = hf_hub_download(
        repo_id=repository,
        filename=name,
        repo_type="dataset",
        revision=metadata.commit_hash or source.revision,
        local_dir=staging,
    )
    etag = metadata.etag or ""
    expected = replace(
        source,
        sha256=source.sha256 or (etag if len(etag) == 64 else None),
        git_blob=source.git_blob or (etag if len(etag) == 40 else None),
        n_bytes=source.n_bytes or metadata.size,
    )
    try:
        _check(Path(cached), expected)
    except _NotTheFile:
        shutil.rmtree(staging)
        raise
    _put(Path(cached), place)
    shutil.rmtree(staging)


# --- Other servers -----------------------------------------------------------------------------------------


def _from_url(source: Source, place: Path, console: Console) -> None:
    if source.url is None:
        raise _NotTheFile("its publisher gives no address that a program can read")
    part = place.with_name(f"{place.name}.part")
    download = _Download(source, source.url, part, console)
    download.complete()
    try:
        _check(part, source)
    except _NotTheFile:
        download.forget()
        raise
    _put(part, place)
    download.forget()


class _Download:
    """A download that keeps what it has in a `.part` file and requests the rest.

    The rest is taken only from the same file: the server's strong entity tag, kept beside the part, is the same, or
    the file has a published checksum. Otherwise the download starts over.
    """

    def __init__(self, source: Source, url: str, part: Path, console: Console) -> None:
        self._source = source
        self._url = url
        self._part = part
        self._tag = part.with_name(f"{part.name}.etag")  # two lines: the address, the entity tag
        self._console = console

    def complete(self) -> None:
        """Receive what is missing.

        Raises:
            RequestException: no connection, a refusal, or a body that breaks off.
            _NotTheFile: what the server offers cannot be the file.
        """
        tag = self._kept_tag()
        done = self._part.stat().st_size if tag or (self._source.has_checksum and self._part.exists()) else 0
        if not done:
            with self._request({}) as response:
                self._receive(response, 0)
            return
        with self._request({"Range": f"bytes={done}-", **({"If-Range": tag} if tag else {})}) as response:
            if response.headers.get("Content-Range") == f"bytes */{done}":
                return  # nothing is left to send
            if response.status_code == requests.codes.ok:
                self._receive(response, 0)
                return
            if _continues(response, done, tag):
                self._receive(response, done)
                return
            if response.status_code not in (requests.codes.partial_content, requests.codes.range_not_satisfiable):
                response.raise_for_status()
        self.forget()  # the server sends another part, or the part is of another file
        self.complete()

    def forget(self) -> None:
        """Drop what was received so far."""
        self._part.unlink(missing_ok=True)
        self._tag.unlink(missing_ok=True)

    def _request(self, headers: Mapping[str, str]) -> requests.Response:
        # Positions in a compressed answer are not positions in the file.
        headers = {"Accept-Encoding": "identity", **headers}
        return requests.get(self._url, headers=headers, stream=True, timeout=_TIMEOUT)

    def _kept_tag(self) -> str | None:
        """The entity tag of the file that the part is of, where there is a part and the server gave a tag."""
        if not (self._tag.exists() and self._part.exists()):
            return None
        url, _, tag = self._tag.read_text(encoding="utf-8", errors="replace").partition("\n")
        return tag if url == self._url and tag else None

    def _receive(self, response: requests.Response, done: int) -> None:
        response.raise_for_status()
        total = self._announced(response, done)
        if not done:
            self.forget()
            self._remember(response)  # while there is no part: a tag never stands beside the part of another file
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            task = progress.add_task(self._part.stem, total=total, completed=done)
            with self._part.open("ab" if done else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
        size = self._part.stat().st_size
        if total is not None and size != total:
            if size > total:
                self.forget()
            raise requests.ConnectionError(f"the server sent {size:,} of {total:,} bytes; the same command goes on")

    def _announced(self, response: requests.Response, done: int) -> int | None:
        """Bytes of the whole file as the server has it; None where only the end of the body tells them.

        Raises:
            _NotTheFile: not the published size, or nothing would show that the body was cut.
        """
        headers, published = response.headers, self._source.n_bytes
        framed = "Content-Length" in headers or "chunked" in headers.get("Transfer-Encoding", "").lower()
        if not framed and published is None and not self._source.has_checksum:
            raise _NotTheFile("the server does not say how long it is, so that a cut could not be seen")
        total = _total(response, done)
        if total is not None and published not in (None, total):
            kind = headers.get("Content-Type", "no stated type")
            raise _NotTheFile(
                f"the server offers {total:,} bytes ({kind}), and the published file has {published:,}; it may be a "
                "sign-in or an error page"
            )
        return total

    def _remember(self, response: requests.Response) -> None:
        """Keep the address and the entity tag, if it is a strong one of the body as it is stored."""
        tag = response.headers.get("ETag", "")
        if tag.startswith('"') and not _is_encoded(response):
            self._tag.write_text(f"{self._url}\n{tag}", encoding="utf-8")


def _total(response: requests.Response, done: int) -> int | None:
    """Bytes of the whole file as the headers have them.

    Raises:
        _NotTheFile: a part that does not begin at byte `done`.
    """
    if response.status_code == requests.codes.partial_content:
        part = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if part is None or int(part[1]) != done:
            raise _NotTheFile("the server sends a part of a file where the whole was requested")
        return int(part[3])
    length = response.headers.get("Content-Length")
    return None if length is None or _is_encoded(response) else int(length)


def _is_encoded(response: requests.Response) -> bool:
    """Whether the body is compressed on its way, so that its length is not that of the file."""
    return response.headers.get("Content-Encoding", "identity") != "identity"


def _continues(response: requests.Response, done: int, tag: str | None) -> bool:
    """Whether an answer is the rest, from byte `done` on, of the file with this entity tag."""
    part = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (
        response.status_code == requests.codes.partial_content
        and part is not None
        and int(part[1]) == done
        and (tag is None or response.headers.get("ETag") == tag)
    )


def _put(path: Path, place: Path) -> None:
    """Give a checked file its final name, on the disk before the name is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    path.replace(place)
    flush_folder(place.parent)
