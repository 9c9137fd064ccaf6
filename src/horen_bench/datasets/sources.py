"""Getting the published files: what `data/manifest.yaml` lists, downloaded, checked, put in place as a whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError as HubHTTPError  # type: ignore[attr-defined]  # also lost connections
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from horen_bench.errors import UserError
from horen_bench.paths import resource

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without an answer


@dataclass(frozen=True, slots=True)
class Source:
    """One file of the manifest.

    Attributes:
        file: where it goes, below the data folder.
        url: where it is, or None for a file of a hub dataset.
        hub: dataset repository on huggingface.co, or None.
        hub_file: its name there.
        sha256: of its content, or None where nobody has published it.
        n_bytes: its size, or None where it is not known.
        licence: as stated at the source, or "not stated".
    """

    file: str
    url: str | None = None
    hub: str | None = None
    hub_file: str | None = None
    sha256: str | None = None
    n_bytes: int | None = None
    licence: str = "not stated"


def manifest() -> dict[str, list[Source]]:
    """Every downloadable file, by dataset."""
    content: Any = OmegaConf.to_container(OmegaConf.load(resource("data") / "manifest.yaml"))
    return {name: [Source(**entry) for entry in entries] for name, entries in content.items()}


def fetch(dataset: str, data_dir: Path, console: Console) -> list[Path]:
    """Download the files of a dataset that are not there yet.

    A download that was interrupted goes on where it stopped; a file appears under its name only when it is whole and
    its checksum, where one is known, is right.

    Raises:
        UserError: no such dataset, no connection, a server's refusal, or a wrong checksum.
    """
    sources = manifest()
    if dataset not in sources:
        raise UserError(f"{dataset} is not in the manifest; it has {', '.join(sources)}")
    return [_fetched(source, data_dir, console) for source in sources[dataset]]


def _fetched(source: Source, data_dir: Path, console: Console) -> Path:
    place = data_dir / source.file
    if place.exists():
        console.print(f"{place} is there already", highlight=False)
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.hub:
            _from_hub(source, place)
        else:
            _from_url(source, place, console)
    except (requests.RequestException, HubHTTPError, OSError) as error:
        raise UserError(
            f"{source.url or source.hub} cannot be downloaded ({' '.join(str(error).split())[:160]}); get it by other "
            f"means and put it at {place}"
        ) from error
    return place


def _from_hub(source: Source, place: Path) -> None:
    """A file of a hub dataset; huggingface_hub resumes and checks it, and shows its own progress."""
    cached = hf_hub_download(
        repo_id=str(source.hub), filename=str(source.hub_file), repo_type="dataset", local_dir=place.parent
    )
    Path(cached).replace(place)


def _from_url(source: Source, place: Path, console: Console) -> None:
    pooch.get_logger().setLevel("WARNING")
    known_hash = f"sha256:{source.sha256}" if source.sha256 else None
    try:
        pooch.retrieve(
            url=str(source.url),
            known_hash=known_hash,
            fname=place.name,
            path=place.parent,
            downloader=_Resuming(place.with_name(f"{place.name}.part"), console),
        )
    except ValueError as error:  # pooch's word for a wrong checksum
        place.with_name(f"{place.name}.part").unlink(missing_ok=True)
        raise UserError(
            f"{source.url} does not have the expected checksum; the file changed upstream or was damaged on the way"
        ) from error


class _Resuming:
    """A pooch downloader that keeps what it has in a `.part` file and asks the server for the rest."""

    def __init__(self, part: Path, console: Console) -> None:
        self._part = part
        self._console = console

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        self._complete(url)
        self._part.replace(output_file)

    def _complete(self, url: str) -> None:
        done = self._part.stat().st_size if self._part.exists() else 0
        headers = {"Accept-Encoding": "identity"}  # positions in a compressed answer are not positions in the file
        if done:
            headers["Range"] = f"bytes={done}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            if response.status_code != requests.codes.requested_range_not_satisfiable:
                response.raise_for_status()
                self._append(response, done if response.status_code == requests.codes.partial_content else 0)
            elif response.headers.get("Content-Range") != f"bytes */{done}":  # else the part is whole
                self._part.unlink()  # it is of another, longer file
                self._complete(url)

    def _append(self, response: requests.Response, done: int) -> None:
        length = response.headers.get("Content-Length")
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self._console) as progress:
            total = done + int(length) if length else None
            task = progress.add_task(self._part.stem, total=total, completed=done)
            with self._part.open("ab" if done else "wb") as file:
                for chunk in response.iter_content(_CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
