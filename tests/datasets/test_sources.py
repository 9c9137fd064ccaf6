"""Getting files: the manifest, and downloads from a server that cuts, refuses, and garbles."""

import gzip
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from rich.console import Console

from horen_bench.config.compose import run_config
from horen_bench.config.schema import Dataset
from horen_bench.datasets import sources
from horen_bench.datasets.sources import Source, fetch, git_blob_id, manifest
from horen_bench.paths import resource

Refusal = Callable[[Callable[[], object]], str]

CONTENT = json.dumps([{"number": i} for i in range(170_000)]).encode()  # 3 MB: three blocks of the downloader
OTHER = json.dumps([{"numbre": i} for i in range(170_000)]).encode()  # as long as CONTENT
PAGE = b"<!DOCTYPE html><title>Sign in</title><form action=/login>"
LOST: type[Exception] = HfHubHTTPError.__mro__[1]  # what the hub's HTTP library raises when a connection breaks
SHA256 = hashlib.sha256(CONTENT).hexdigest()
BLOB = git_blob_id(CONTENT)


# --- The manifest ------------------------------------------------------------------------------------------


def test_every_entry_says_where_its_file_is_and_where_it_goes() -> None:
    entries = [source for several in manifest().values() for source in several]
    assert len({source.file for source in entries}) == len(entries) == 19
    for source in entries:
        assert source.url is None or source.hub is None
        assert (source.hub is None) == (source.hub_file is None)
        assert len(Path(source.file).parts) == 2
        assert Path(source.file).suffix == ".json"
        assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.git_blob is None or re.fullmatch("[0-9a-f]{40}", source.git_blob)
        assert source.n_bytes is None or source.n_bytes > 0
        assert source.licence
        if origin := source.url or source.hub_file:
            assert Path(source.file).name == origin.rpartition("/")[2]
        else:
            assert source.has_checksum, "nothing could be known of it"
        if source.url:
            assert source.url.startswith("https://")


def test_what_publishers_say_of_their_files_is_in_the_manifest() -> None:
    known = {source.file: source for several in manifest().values() for source in several}
    assert known["zsre/zsre_edit_data.json"].git_blob == "4d558bbf5619cef889bf9dd2351367d16e31c2f4"
    assert known["zsre/zsre_train_data.json"].git_blob == "aa785da86c7c887dcb20ebfb4227f34554af511d"
    merged = known["wikibigedit/wikibigedit.json"]
    assert merged.sha256 == "546ba3aa8204b41200ad015bbfe2ffda9e46095b0796e5bc347e9c3546d03fc7"
    assert merged.n_bytes == 250_648_693


def test_the_blob_id_is_that_of_git() -> None:
    # `printf 'what is up, doc?' | git hash-object --stdin`, the example of the book "Pro Git"; and the empty file.
    assert git_blob_id(b"what is up, doc?") == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"
    assert git_blob_id(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"


@pytest.mark.parametrize("name", ["../a.json", "mine/../../a.json", "/etc/a.json", "mine\\..\\a.json", "C:/a.json", ""])
@pytest.mark.parametrize("where", ["file", "hub_file"])
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, where: str, refusal: Refusal) -> None:
    names: dict[str, Any] = {"file": "mine/a.json", "hub": "a/b", "hub_file": "a.json", where: name}
    sentence = refusal(lambda: Source(**names))
    assert repr(name) in sentence
    assert "manifest.yaml" in sentence


NOT_FETCHED = ("facts", "passages", "records")  # made up, or of the user


def dataset_names() -> list[str]:
    return sorted(path.stem for path in (resource("conf") / "dataset").glob("*.yaml") if path.stem not in NOT_FETCHED)


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
    sentence = refusal(lambda: fetch("facts", tmp_path, Console(quiet=True)))
    assert sentence.startswith("facts ")
    assert all(name in sentence for name in manifest())


# --- A server on this machine ------------------------------------------------------------------------------


@dataclass
class Server:
    """What the server does and what was requested of it.

    Attributes:
        url: of the one file it has.
        content: of the file.
        cut_after: end each answer after so many bytes of its body, as a broken connection does.
        status: answer with this status and no file.
        heeds_range: whether it can send a part.
        heeds_if_range: whether it sends the whole if the part is of another content.
        part_from: send parts from this byte, wherever they were to begin.
        tag: entity tag of the content; `strong` and `weak` give one that follows the content, None gives none.
        length: how the end of a body is told: `stated`, `chunked`, or `closed` with the connection.
        kind: the content type.
        ranges: `Range` of each request, None where there was none.
    """

    url: str = ""
    content: bytes = CONTENT
    cut_after: int | None = None
    status: int | None = None
    heeds_range: bool = True
    heeds_if_range: bool = True
    part_from: int | None = None
    tag: str | None = None
    length: str = "stated"
    kind: str = "application/json"
    ranges: list[str | None] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        if self.status:
            request.send_error(self.status)
            return
        body, start = self.content, 0
        etag = {"strong": f'"{hash(self.content)}"', "weak": f'W/"{hash(self.content)}"'}.get(str(self.tag), "")
        changed = self.heeds_if_range and request.headers.get("If-Range", etag) != etag
        if "gzip" in request.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body)
        if asked and self.heeds_range and not changed:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                request.send_response(416)
                request.send_header("Content-Range", f"bytes */{len(body)}")
                request.send_header("Content-Length", "0")
                request.end_headers()
                return
            start = start if self.part_from is None else self.part_from
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        if body is not self.content:
            request.send_header("Content-Encoding", "gzip")
        if etag:
            request.send_header("ETag", etag)
        request.send_header("Content-Type", self.kind)
        self.send(request, body[start:])

    def send(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        sent = body[: self.cut_after]
        if self.length == "stated":
            request.send_header("Content-Length", str(len(body)))
        if self.length == "chunked":
            request.send_header("Transfer-Encoding", "chunked")
            end = b"0\r\n\r\n" if sent == body else b""
            sent = b"%x\r\n" % len(sent) + sent + b"\r\n" + end
        request.end_headers()
        request.wfile.write(sent)
        request.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    said = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

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


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- Whole files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "published",
    [
        {},
        {"sha256": SHA256},
        {"git_blob": BLOB},
        {"n_bytes": len(CONTENT)},
        {"sha256": SHA256, "n_bytes": len(CONTENT)},
    ],
)
def test_a_file_is_put_where_the_manifest_says_and_nothing_beside_it(
    published: dict[str, Any], server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, **published)
    assert fetched(tmp_path / "data") == [tmp_path / "data/mine/data.json"]
    assert (tmp_path / "data/mine/data.json").read_bytes() == CONTENT
    assert files(tmp_path) == ["data/mine/data.json"]
    assert server.ranges == [None]


def test_size_and_checksum_of_what_came_are_printed(
    server: Server, offer: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    offer(url=server.url)
    fetch("mine", tmp_path, Console())
    out = capsys.readouterr().out
    assert SHA256 in out
    assert f"{len(CONTENT):,} bytes" in out


@pytest.mark.parametrize("published", [{}, {"sha256": SHA256}])
def test_a_file_that_is_there_is_not_fetched_again(
    published: dict[str, Any], server: Server, *, offer: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    offer(url=server.url, **published)
    place = put(tmp_path / "mine/data.json", CONTENT)
    assert fetch("mine", tmp_path, Console(soft_wrap=True)) == [place]
    assert capsys.readouterr().out == f"{place} is there already\n"
    assert server.ranges == []


@pytest.mark.parametrize(
    ("published", "content", "fact"),
    [
        ({"sha256": SHA256}, OTHER, SHA256),
        ({"git_blob": BLOB}, OTHER, BLOB),
        ({"n_bytes": len(CONTENT)}, CONTENT[:-1], f"{len(CONTENT):,}"),
        ({}, PAGE, "no JSON list of records"),
        ({}, CONTENT[:-1], "no JSON list of records"),
    ],
)
def test_a_file_that_is_there_and_is_not_the_published_one_is_named_and_left_alone(
    published: dict[str, Any],
    content: bytes,
    fact: str,
    *,
    server: Server,
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
) -> None:
    offer(url=server.url, **published)
    place = put(tmp_path / "mine/data.json", content)
    sentence = refusal(lambda: fetched(tmp_path))
    assert sentence.startswith(str(place))
    assert fact in sentence
    assert "move it away" in sentence
    assert place.read_bytes() == content
    assert server.ranges == []


def test_a_file_that_no_program_can_get_is_checked_where_the_user_put_it(
    offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(sha256=SHA256)
    place = tmp_path / "mine/data.json"
    assert f"put it at {place}" in refusal(lambda: fetched(tmp_path))
    put(place, CONTENT)
    assert fetched(tmp_path) == [place]


def test_all_files_of_a_dataset_are_fetched_in_order(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [Source(f"mine/{name}.json", url=server.url) for name in ("b", "a")]
    monkeypatch.setattr(sources, "manifest", lambda: {"mine": several, "other": [Source("other/c.json", url="no")]})
    assert fetched(tmp_path) == [tmp_path / "mine/b.json", tmp_path / "mine/a.json"]
    assert files(tmp_path) == ["mine/a.json", "mine/b.json"]


# --- Interrupted downloads ---------------------------------------------------------------------------------


KNOWN: list[dict[str, Any]] = [{"sha256": SHA256}, {"git_blob": BLOB}]


def interrupted(tmp_path: Path, refusal: Refusal, server: Server) -> int:
    """Bytes that a download keeps, of which the server sends only the beginning."""
    server.cut_after = 2_500_000
    refusal(lambda: fetched(tmp_path))
    server.cut_after = None
    assert not (tmp_path / "mine/data.json").exists()
    return (tmp_path / "mine/data.json.part").stat().st_size


def is_advised(sentence: str, url: str, place: Path) -> bool:
    """Whether a sentence names the source and says what to do."""
    return (
        sentence.startswith(f"{url} cannot be downloaded (")
        and f"put it at {place}" in sentence
        and "\n" not in sentence
    )


@pytest.mark.parametrize("published", KNOWN)
def test_an_interrupted_download_leaves_no_file_under_the_final_name_and_goes_on_where_it_stopped(
    published: dict[str, Any], server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, **published)
    server.cut_after = 2_500_000
    assert is_advised(refusal(lambda: fetched(tmp_path)), server.url, tmp_path / "mine/data.json")
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


def test_a_file_without_checksum_goes_on_if_the_server_has_the_same_one_still(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.tag = "strong"
    n_kept = interrupted(tmp_path, refusal, server)
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT
    assert files(tmp_path) == ["mine/data.json"]


@pytest.mark.parametrize("tag", [None, "weak"])
def test_a_file_without_checksum_starts_over_if_nothing_shows_that_it_is_the_same(
    tag: str | None, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.tag = tag
    interrupted(tmp_path, refusal, server)
    server.content = OTHER
    fetched(tmp_path)
    assert server.ranges == [None, None]
    assert (tmp_path / "mine/data.json").read_bytes() == OTHER


def test_a_file_that_changed_at_the_source_is_not_put_behind_the_head_of_the_old_one(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.tag = "strong"
    n_kept = interrupted(tmp_path, refusal, server)
    server.content = OTHER
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-"]  # answered with the whole, as If-Range has it
    assert (tmp_path / "mine/data.json").read_bytes() == OTHER
    assert files(tmp_path) == ["mine/data.json"]


@pytest.mark.parametrize("tag", ["strong", "weak", None])
def test_a_server_that_does_not_heed_if_range_is_found_out_by_its_tag(
    tag: str | None, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.tag = "strong"
    n_kept = interrupted(tmp_path, refusal, server)
    server.content, server.heeds_if_range, server.tag = OTHER, False, tag
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-", None]
    assert (tmp_path / "mine/data.json").read_bytes() == OTHER


def test_the_part_of_another_address_is_not_gone_on_with(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.tag = "strong"
    interrupted(tmp_path, refusal, server)
    offer(url=f"{server.url}?version=2")
    fetched(tmp_path)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("part_from", [0, 5])
@pytest.mark.parametrize("published", [{}, {"sha256": SHA256}])
def test_a_part_from_another_byte_than_the_requested_one_is_not_put_behind_what_is_there(
    part_from: int,
    published: dict[str, Any],
    *,
    server: Server,
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
) -> None:
    offer(url=server.url, **published)
    server.tag = "strong"
    n_kept = interrupted(tmp_path, refusal, server)
    server.part_from = part_from
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-", None]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_server_that_cannot_send_the_rest_sends_the_whole(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, sha256=SHA256)
    server.heeds_range = False
    put(tmp_path / "mine/data.json.part", CONTENT[:1000])
    fetched(tmp_path)
    assert server.ranges == ["bytes=1000-"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_only_renamed(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, sha256=SHA256)
    put(tmp_path / "mine/data.json.part", CONTENT)
    fetched(tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT)}-"]
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_part_of_a_longer_file_than_the_server_has_now_is_given_up(
    server: Server, offer: Callable[..., None], tmp_path: Path
) -> None:
    offer(url=server.url, sha256=SHA256)
    put(tmp_path / "mine/data.json.part", b"x" * (len(CONTENT) + 1))
    fetched(tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT) + 1}-", None]
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


@pytest.mark.parametrize("published", KNOWN)
def test_a_part_of_something_else_is_found_out_by_the_checksum_and_the_next_download_starts_over(
    published: dict[str, Any], server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, **published)
    put(tmp_path / "mine/data.json.part", OTHER[:1_000_000])
    assert next(iter(published.values())) in refusal(lambda: fetched(tmp_path))
    assert files(tmp_path) == []
    fetched(tmp_path)
    assert server.ranges == ["bytes=1000000-", None]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


# --- Bodies whose end cannot be seen, and pages in place of the file ---------------------------------------


@pytest.mark.parametrize("n", [1_000_000, len(CONTENT)])
def test_a_body_whose_end_nothing_tells_is_not_believed(
    n: int, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.length, server.cut_after = "closed", n
    sentence = refusal(lambda: fetched(tmp_path))
    assert is_advised(sentence, server.url, tmp_path / "mine/data.json")
    assert "how long" in sentence
    assert files(tmp_path) == []


@pytest.mark.parametrize("published", [*KNOWN, {"n_bytes": len(CONTENT)}])
def test_what_is_published_tells_whether_such_a_body_was_cut(
    published: dict[str, Any], server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, **published)
    server.length, server.cut_after = "closed", 1_000_000
    refusal(lambda: fetched(tmp_path))
    assert files(tmp_path) == []
    server.cut_after = None
    fetched(tmp_path)
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


def test_a_body_in_chunks_that_breaks_off_is_not_believed(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.length, server.cut_after = "chunked", len(CONTENT) - 1
    assert is_advised(refusal(lambda: fetched(tmp_path)), server.url, tmp_path / "mine/data.json")
    assert not (tmp_path / "mine/data.json").exists()
    server.cut_after = None
    fetched(tmp_path)
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT


@pytest.mark.parametrize("length", ["stated", "chunked", "closed"])
@pytest.mark.parametrize(
    "published", [{}, {"n_bytes": len(CONTENT)}, {"sha256": SHA256}, {"git_blob": BLOB, "n_bytes": len(CONTENT)}]
)
def test_a_sign_in_page_is_not_taken_for_the_file(
    length: str,
    published: dict[str, Any],
    *,
    server: Server,
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
) -> None:
    offer(url=server.url, **published)
    server.content, server.kind, server.length = PAGE, "text/html", length
    sentence = refusal(lambda: fetched(tmp_path))
    assert is_advised(sentence, server.url, tmp_path / "mine/data.json")
    if length == "stated" and "n_bytes" in published:
        assert all(fact in sentence for fact in (f"{len(PAGE):,}", f"{len(CONTENT):,}", "text/html", "sign-in"))
    assert files(tmp_path) == []


def test_a_sign_in_page_does_not_cost_what_was_received_before(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, n_bytes=len(CONTENT))
    server.tag = "strong"
    n_kept = interrupted(tmp_path, refusal, server)
    server.content = PAGE
    refusal(lambda: fetched(tmp_path))
    server.content = CONTENT
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={n_kept}-", f"bytes={n_kept}-"]


@pytest.mark.parametrize("content", [b'{"message": "rate limit"}', b"[]", b"[1, 2]", b'[{"a": 1}, "b"]', b" "])
def test_json_that_is_no_list_of_records_is_not_taken_for_the_file(
    content: bytes, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.content = content
    refusal(lambda: fetched(tmp_path))
    assert files(tmp_path) == []


# --- Refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("published", KNOWN)
def test_a_file_with_a_wrong_checksum_is_refused_and_not_kept(
    published: dict[str, Any], server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, **published)
    server.content = OTHER
    sentence = refusal(lambda: fetched(tmp_path))
    assert is_advised(sentence, server.url, tmp_path / "mine/data.json")
    actual = hashlib.sha256(OTHER).hexdigest() if "sha256" in published else git_blob_id(OTHER)
    assert actual in sentence
    assert next(iter(published.values())) in sentence
    assert files(tmp_path) == []
    server.content = CONTENT
    fetched(tmp_path)
    assert server.ranges == [None, None]


@pytest.mark.parametrize("status", [404, 503])
def test_a_servers_refusal_is_one_sentence(
    status: int, server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    server.status = status
    sentence = refusal(lambda: fetched(tmp_path))
    assert is_advised(sentence, server.url, tmp_path / "mine/data.json")
    assert str(status) in sentence
    assert files(tmp_path) == []


def test_a_refusal_does_not_cost_what_was_received_before(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url, sha256=SHA256)
    n_kept = interrupted(tmp_path, refusal, server)
    server.status = 503
    refusal(lambda: fetched(tmp_path))
    server.status = None
    fetched(tmp_path)
    assert server.ranges == [None, *[f"bytes={n_kept}-"] * 2]


def test_a_connection_that_is_refused_is_one_sentence(
    offer: Callable[..., None], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: nobody else takes the port
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/data.json"
        offer(url=url)
        assert is_advised(refusal(lambda: fetched(tmp_path)), url, tmp_path / "mine/data.json")
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
        sentence = refusal(lambda: fetched(tmp_path)).lower()
        assert "timed out" in sentence
        assert "0.2" in sentence


def test_a_data_folder_that_cannot_be_made_is_one_sentence(
    server: Server, offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    offer(url=server.url)
    data_dir = put(tmp_path / "data", b"a file")
    sentence = refusal(lambda: fetched(data_dir))
    assert is_advised(sentence, server.url, data_dir / "mine/data.json")
    assert "Not a directory" in sentence


def test_a_full_disk_is_one_sentence_and_what_came_is_kept(
    server: Server, *, offer: Callable[..., None], tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(url=server.url, sha256=SHA256)
    (tmp_path / "mine").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refusal(lambda: fetched(tmp_path))
    assert files(tmp_path) == ["mine/data.json.part"]
    fetched(tmp_path)
    assert server.ranges == [None, f"bytes={len(CONTENT)}-"]


# --- The hub -----------------------------------------------------------------------------------------------


COMMIT = "4d" * 20


class Hub:
    """The two functions of huggingface_hub that are called, on a repository of one file."""

    def __init__(self, content: bytes, etag: str | None, size: int | None) -> None:
        self.content = content
        self.metadata = SimpleNamespace(commit_hash=COMMIT, etag=etag, size=size)
        self.addresses: list[str] = []
        self.requests: list[dict[str, Any]] = []

    def get_hf_file_metadata(self, url: str) -> SimpleNamespace:
        self.addresses.append(url)
        return self.metadata

    def hf_hub_download(self, **request: Any) -> str:
        self.requests.append(request)
        return str(put(Path(request["local_dir"]) / request["filename"], self.content))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    """Puts a hub in place that has some content, and states its checksum and size."""

    def having(content: bytes, etag: str | None = None, size: int | None = None) -> Hub:
        instead = Hub(content, etag, size)
        monkeypatch.setattr(sources, "get_hf_file_metadata", instead.get_hf_file_metadata)
        monkeypatch.setattr(sources, "hf_hub_download", instead.hf_hub_download)
        return instead

    return having


@pytest.mark.parametrize("hub_file", ["data.json", "splits/other_name.json"])
@pytest.mark.parametrize("etag", [SHA256, BLOB, None])
@pytest.mark.parametrize("revision", [None, "1f" * 20])
def test_a_file_of_the_hub_is_downloaded_of_one_commit_checked_and_put_in_place(
    hub_file: str,
    etag: str | None,
    revision: str | None,
    *,
    hub: Callable[..., Hub],
    offer: Callable[..., None],
    tmp_path: Path,
) -> None:
    there = hub(CONTENT, etag, len(CONTENT))
    offer(hub="somebody/Something", hub_file=hub_file, revision=revision)
    assert fetched(tmp_path) == [tmp_path / "mine/data.json"]
    (address,) = there.addresses
    assert f"datasets/somebody/Something/resolve/{revision or 'main'}/" in address
    (request,) = there.requests
    assert request["local_dir"] != tmp_path / "mine"  # else it stood under its final name before it was checked
    assert (request["repo_id"], request["repo_type"], request["filename"], request["revision"]) == (
        "somebody/Something",
        "dataset",
        hub_file,
        COMMIT,
    )
    assert files(tmp_path) == ["mine/data.json"]
    assert (tmp_path / "mine/data.json").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["data.json"]


@pytest.mark.parametrize(
    ("etag", "size", "published"),
    [
        (SHA256, None, {}),
        (BLOB, None, {}),
        (None, len(OTHER) - 1, {}),
        (None, None, {"sha256": SHA256}),
        (
            hashlib.sha256(OTHER).hexdigest(),
            len(OTHER),
            {"sha256": SHA256},
        ),  # the hub has another file than was checked
    ],
)
def test_a_file_of_the_hub_that_is_not_the_stated_one_is_refused_and_not_kept(
    etag: str | None,
    size: int | None,
    published: dict[str, Any],
    *,
    hub: Callable[..., Hub],
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
) -> None:
    hub(OTHER, etag, size)
    offer(hub="somebody/Something", hub_file="data.json", **published)
    sentence = refusal(lambda: fetched(tmp_path))
    assert "somebody/Something cannot be downloaded (" in sentence
    assert str(tmp_path / "mine/data.json") in sentence
    assert files(tmp_path) == []


def test_a_page_of_the_hub_is_not_taken_for_the_file(
    hub: Callable[..., Hub], offer: Callable[..., None], tmp_path: Path, refusal: Refusal
) -> None:
    hub(PAGE)
    offer(hub="somebody/Something", hub_file="data.json")
    assert "no JSON list of records" in refusal(lambda: fetched(tmp_path))
    assert files(tmp_path) == []


@pytest.mark.parametrize("where", ["get_hf_file_metadata", "hf_hub_download"])
@pytest.mark.parametrize(
    "failure",
    [LocalEntryNotFoundError("no\n  connection"), LOST("no connection"), OSError("no connection")],
    ids=["offline", "connection lost on the way", "disk"],
)
def test_a_failure_of_the_hub_is_one_sentence(
    failure: Exception,
    where: str,
    *,
    hub: Callable[..., Hub],
    offer: Callable[..., None],
    tmp_path: Path,
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise failure

    hub(CONTENT, SHA256, len(CONTENT))
    monkeypatch.setattr(sources, where, fail)
    offer(hub="somebody/Something", hub_file="data.json")
    sentence = refusal(lambda: fetched(tmp_path))
    assert is_advised(sentence.removeprefix("hub: "), "somebody/Something", tmp_path / "mine/data.json")
    assert "no connection" in sentence
    assert files(tmp_path) == []
