"""Getting files: the manifest, and downloads from a server that cuts, refuses, and garbles."""

import gzip
import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.console import Console

from horen_bench.config.compose import run_config
from horen_bench.config.schema import Dataset
from horen_bench.datasets import sources
from horen_bench.datasets.sources import Source, fetch, manifest
from horen_bench.paths import resource

Refusal = Callable[[Callable[[], object]], str]

CONTENT = bytes(range(256)) * 12_000  # 3 MB: three blocks of the downloader
LOST: type[Exception] = HfHubHTTPError.__mro__[1]  # what the hub's HTTP library raises when a connection breaks
SHA256 = hashlib.sha256(CONTENT).hexdigest()


# --- The manifest ------------------------------------------------------------------------------------------


def test_every_entry_says_where_its_file_is_and_where_it_goes() -> None:
    entries = [source for several in manifest().values() for source in several]
    assert len({source.file for source in entries}) == len(entries) == 18
    for source in entries:
        assert (source.url is None) != (source.hub is None)
        assert (source.hub is None) == (source.hub_file is None)
        origin = str(source.url or source.hub_file)
        assert Path(source.file).name == origin.rpartition("/")[2]
        assert len(Path(source.file).parts) == 2
        assert Path(source.file).suffix == ".json"
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.n_bytes is None or source.n_bytes > 0
        assert source.licence
        if source.url:
            assert source.url.startswith("https://")


MADE_UP = ("facts", "passages")  # need no files


def dataset_names() -> list[str]:
    return sorted(path.stem for path in (resource("conf") / "dataset").glob("*.yaml") if path.stem not in MADE_UP)


def dataset_of(name: str, data_dir: Path) -> Dataset:
    return run_config([f"dataset={name}", f"data_dir={data_dir}"]).dataset


@pytest.mark.parametrize("name", dataset_names())
def test_what_is_fetched_for_a_dataset_is_what_its_configuration_reads(
    name: str, tmp_path: Path, refusal: Refusal
) -> None:
    dataset = dataset_of(name, tmp_path)
    settings = dataset.model_dump()
    read = {settings.get("path"), settings.get("train_path"), *settings.get("paths", ())} - {None}
    sentence = refusal(lambda: dataset.cases(1))
    advised = re.search(r"python -m horen_bench\.datasets fetch (\w+),", sentence)
    assert advised is not None
    fetched = {str(tmp_path / source.file) for source in manifest()[advised[1]]}
    folders = {str(Path(file).parent) for file in fetched}
    assert read <= fetched | folders


def test_the_hub_has_the_eight_files_that_the_wikibigedit_loader_looks_for(tmp_path: Path, refusal: Refusal) -> None:
    (tmp_path / "wikibigedit").mkdir()
    sentence = refusal(lambda: dataset_of("wikibigedit", tmp_path).cases(1))
    missing = re.findall(r"wiki_big_edit_\w+\.json", sentence)
    assert missing == [Path(source.file).name for source in manifest()["wikibigedit"]]


def test_a_known_checksum_is_that_of_the_published_file(real_records: Path) -> None:
    (known,) = (source for source in manifest()["unke"] if source.sha256)
    content = (real_records / f"unke_{Path(known.file).name}").read_bytes()
    assert hashlib.sha256(content).hexdigest() == known.sha256
    assert len(content) == known.n_bytes


def test_a_dataset_that_is_not_in_the_manifest_is_refused(tmp_path: Path, refusal: Refusal) -> None:
    assert refusal(lambda: fetch("facts", tmp_path, Console(quiet=True))) == (
        "facts is not in the manifest; it has zsre, zsre_mend, wikibigedit, unke, counterfact, mquake, wikiupdate, "
        "alpaca"
    )


# --- A server on this machine ------------------------------------------------------------------------------


@dataclass
class Server:
    """What the server does and what it was asked.

    Attributes:
        url: of the one file it has.
        content: of the file.
        cut_after: end each answer after so many bytes of its body, as a broken connection does.
        status: answer with this status and no file.
        heeds_range: whether it can send a part.
        ranges: `Range` of each request, None where there was none.
    """

    url: str = ""
    content: bytes = CONTENT
    cut_after: int | None = None
    status: int | None = None
    heeds_range: bool = True
    ranges: list[str | None] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if self.status:
            request.send_error(self.status)
            return
        body, start = self.content, 0
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
        if asked and self.heeds_range:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if body is not self.content:
            request.send_header("Content-Encoding", "gzip")
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        request.wfile.write(body[start:][: self.cut_after])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    said = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said.answer(self)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
            pass

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        said.url = f"http://127.0.0.1:{running.server_address[1]}/data.json"
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield said
        running.shutdown()
        thread.join()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the manifest one dataset, `mine`, of one file, `mine/data.json`."""

    def put(**source: Any) -> None:
        monkeypatch.setattr(sources, "manifest", lambda: {"mine": [Source("mine/data.json", **source)]})

    return put


def fetched(data_dir: Path) -> list[Path]:
    return fetch("mine", data_dir, Console(quiet=True))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Whole files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_file_is_put_where_the_manifest_says_and_nothing_beside_it(
    sha256: str | None, server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, sha256=sha256)
    assert fetched(tmp_path / "data") == [tmp_path / "data/mine/data.json"]
    assert (tmp_path / "data/mine/data.json").read_bytes() == CONTENT
    assert files(tmp_path) == ["data/mine/data.json"]
    assert server.ranges == [None]


def test_a_file_that_is_there_is_not_fetched_again(
    server: Server, offer: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(url=server.url, sha256=SHA256)
    place = tmp_path / "mine/data.json"
    place.parent.mkdir()
    place.write_text("my own")
    assert fetch("mine", tmp_path, Console(soft_wrap=True)) == [place]
    assert capsys.readouterr().out == f"{place} is there already\n"
    assert place.read_text() == "my own"
    assert server.ranges == []


def test_all_files_of_a_dataset_are_fetched_in_order(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [Source(f"mine/{name}.json", url=server.url) for name in ("b", "a")]
    monkeypatch.setattr(sources, "manifest", lambda: {"mine": several, "other": [Source("other/c.json", url="no")]})
    assert fetched(tmp_path) == [tmp_path / "mine/b.json", tmp_path / "mine/a.json"]
    assert files(tmp_path) == ["mine/a.json", "mine/b.json"]


# --- Interrupted downloads ---------------------------------------------------------------------------------


def test_an_interrupted_download_leaves_no_file_under_the_final_name_and_goes_on_where_it_stopped(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, sha256=SHA256)
    server.cut_after = 2_500_000
    sentence = refusal(lambda: fetched(tmp_path))
    assert sentence.startswith(f"{server.url} cannot be downloaded (")
    assert sentence.endswith(f"); get it by other means and put it at {tmp_path / 'mine/data.json'}")
    assert "\n" not in sentence
    assert files(tmp_path) == ["mine/data.json.part"]
    n_kept = (tmp_path / "mine/data.json.part").stat().st_size
    assert 0 < n_kept <= 2_500_000

    server.cut_after = None
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT
    assert files(tmp_path) == ["mine/data.json"]


def test_a_download_may_be_interrupted_again_and_again(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, sha256=SHA256)
    server.cut_after = 1_300_000
    refusal(lambda: fetched(tmp_path))
    refusal(lambda: fetched(tmp_path))
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={1 << 20}-", f"bytes={2 << 20}-"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_server_that_cannot_send_the_rest_sends_the_whole(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url)
    server.heeds_range = False
    part = tmp_path / "mine/data.json.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT[:1000])
    fetched(tmp_path)
    assert server.ranges == ["bytes=1000-"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_only_renamed(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, sha256=SHA256)
    part = tmp_path / "mine/data.json.part"
    part.parent.mkdir()
    part.write_bytes(CONTENT)
    fetched(tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_part_of_a_longer_file_than_the_server_has_now_is_given_up(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url)
    part = tmp_path / "mine/data.json.part"
    part.parent.mkdir()
    part.write_bytes(b"x" * (len(CONTENT) + 1))
    fetched(tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT) + 1}-", None]
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


# --- Refusals ----------------------------------------------------------------------------------------------


def test_a_file_with_a_wrong_checksum_is_refused_and_not_kept(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, sha256=SHA256)
    server.content = CONTENT[:-1] + b"?"
    assert refusal(lambda: fetched(tmp_path)) == (
        f"{server.url} does not have the expected checksum; the file changed upstream or was damaged on the way"
    )
    assert files(tmp_path) == []
    server.content = CONTENT
    fetched(tmp_path)
    assert server.ranges == [None, None]


@pytest.mark.parametrize(("status", "reason"), [(404, "404 Client Error: Not Found"), (503, "503 Server Error: ")])
def test_a_servers_refusal_is_one_sentence(
    status: int, reason: str, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.status = status
    sentence = refusal(lambda: fetched(tmp_path))
    assert sentence.startswith(f"{server.url} cannot be downloaded ({reason}")
    assert sentence.endswith(
        f" for url: {server.url}); get it by other means and put it at {tmp_path / 'mine/data.json'}"
    )
    assert files(tmp_path) == []


def test_a_connection_that_is_refused_is_one_sentence(
    offer: Callable[..., None], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else takes the port
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.json"
        offer(url=url)
        sentence = refusal(lambda: fetched(tmp_path))
    assert sentence.startswith(f"{url} cannot be downloaded (")
    assert sentence.endswith(f"); get it by other means and put it at {tmp_path / 'mine/data.json'}")
    assert "\n" not in sentence
    assert files(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(
    offer: Callable[..., None], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(sources, "_TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        offer(url=f"http://127.0.0.1:{silent.getsockname()[1]}/data.json")
        assert "Read timed out. (read timeout=0.2)" in refusal(lambda: fetched(tmp_path))


def test_a_data_folder_that_cannot_be_made_is_one_sentence(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    data_dir = tmp_path / "data"
    data_dir.write_text("a file")
    assert refusal(lambda: fetched(data_dir)) == (
        f"{server.url} cannot be downloaded ([Errno 20] Not a directory: '{data_dir / 'mine'}'); get it by other "
        f"means and put it at {data_dir / 'mine/data.json'}"
    )


# --- The hub -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_file", ["data.json", "splits/other_name.json"])
def test_a_file_of_the_hub_is_downloaded_beside_its_place_and_renamed(
    hub_file: str, offer: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(**what: Any) -> str:
        asked.append(what)
        path = Path(what["local_dir"]) / what["filename"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"[1]")
        return str(path)

    monkeypatch.setattr(sources, "hf_hub_download", download)
    offer(hub="somebody/Something", hub_file=hub_file)
    assert fetched(tmp_path) == [tmp_path / "mine/data.json"]
    assert asked == [
        {
            "repo_id": "somebody/Something",
            "filename": hub_file,
            "repo_type": "dataset",
            "local_dir": tmp_path / "mine",
        }
    ]
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == b"[1]"


@pytest.mark.parametrize(
    "failure",
    [LocalEntryNotFoundError("no\n  connection"), LOST("no connection"), OSError("no connection")],
    ids=["offline", "connection lost on the way", "disk"],
)
def test_a_failure_of_the_hub_is_one_sentence(
    failure: Exception,
    *,
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def download(**_what: Any) -> str:
        raise failure

    monkeypatch.setattr(sources, "hf_hub_download", download)
    offer(hub="somebody/Something", hub_file="data.json")
    assert refusal(lambda: fetched(tmp_path)) == (
        "somebody/Something cannot be downloaded (no connection); get it by other means and put it at "
        f"{tmp_path / 'mine/data.json'}"
    )
    assert files(tmp_path) == []
