"""Downloads from a server on loopback: whole, cut, altered, missing, slow, and without a network."""

import hashlib
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import download
from common.files.lock import InUseError
from tests.file_server import FileServer, serving

CONTENT = bytes(range(256)) * 40
SHA256 = hashlib.sha256(CONTENT).hexdigest()

Fetch = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def no_pauses_and_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as server:
        server.files["/a.pth"] = CONTENT
        yield server


@pytest.fixture
def fetch(server: FileServer, tmp_path: Path) -> Fetch:
    """Fetch /a.pth to cache/a.pth; returns the reported lines."""

    def run(digits: str | None = SHA256[:8], **options: float) -> list[str]:
        lines: list[str] = []
        download.fetch(f"{server.address}/a.pth", target(tmp_path), digits, report=lines.append, **options)
        return lines

    return run


def target(folder: Path) -> Path:
    return folder / "cache" / "a.pth"


def files_in(folder: Path) -> set[str]:
    return {file.name for file in (folder / "cache").iterdir()} - {".lock"}


def test_a_file_is_downloaded_once_and_its_hash_is_printed(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    lines = fetch()
    assert target(tmp_path).read_bytes() == CONTENT and files_in(tmp_path) == {"a.pth"}
    assert lines[0] == f"downloading {server.address}/a.pth to {target(tmp_path)}"
    assert lines[1].endswith(f"SHA-256 {SHA256} as published")
    assert fetch() == [] and len(server.requests) == 1
    assert fetch(None) == []


def test_without_a_known_hash_the_one_that_came_is_printed(fetch: Fetch) -> None:
    assert fetch(None)[1].endswith(f"a.pth: {len(CONTENT):,} bytes, SHA-256 {SHA256}")


def test_a_cut_download_is_resumed(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    server.cut_after = [1000, 3000, 10]
    fetch()
    assert [part for _, part in server.requests] == [None, "bytes=1000-", "bytes=4000-", "bytes=4010-"]
    assert target(tmp_path).read_bytes() == CONTENT


def test_an_interrupted_download_is_resumed_by_the_next_command(
    fetch: Fetch, server: FileServer, tmp_path: Path
) -> None:
    server.cut_after = [1000, 0, 0, 0]
    with pytest.raises(UserError, match=r"cut, 3 times in succession; 1,000 bytes are kept, and the same command cont"):
        fetch()
    assert not target(tmp_path).exists()
    fetch()
    assert server.requests[-1][1] == "bytes=1000-" and target(tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("how", ["tag", "size", "no ranges", "longer draft"])
def test_a_draft_of_another_content_is_not_continued(
    fetch: Fetch, server: FileServer, tmp_path: Path, how: str
) -> None:
    server.cut_after = [1000, 0, 0, 0]
    with pytest.raises(UserError):
        fetch()
    new = CONTENT[::-1]
    if how == "tag":
        server.tags["/a.pth"] = '"2"'
    elif how == "size":
        new = new[:-1]
    elif how == "no ranges":
        server.ranges = False
    else:
        new = new[:500]
    server.files["/a.pth"] = new
    fetch(hashlib.sha256(new).hexdigest())
    assert target(tmp_path).read_bytes() == new


def test_a_download_that_was_complete_is_not_received_again(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    fetch()
    target(tmp_path).rename(target(tmp_path).with_name(".a.pth.part"))
    target(tmp_path).with_name(".a.pth.part.of").write_text(f'{len(CONTENT)} "1"')
    fetch()
    assert target(tmp_path).exists() and len(server.requests) == 1


def test_another_hash_is_refused_and_the_file_removed(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"SHA-256 {SHA256}, and the published file has 0123abcd\.\.\..*put it at"):
        fetch("0123abcd")
    assert files_in(tmp_path) == set()
    fetch()
    with pytest.raises(UserError, match=r"delete it to download it again"):
        fetch("0123abcd")


def test_a_missing_file_is_one_request_and_one_sentence(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    del server.files["/a.pth"]
    with pytest.raises(UserError) as error:
        fetch()
    address, path = f"{server.address}/a.pth", target(tmp_path)
    remedy = f"try again later, or download that file elsewhere and put it at {path}."
    assert str(error.value) == f"{address} could not be downloaded (the server answers 404 Not Found); {remedy}"
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(fetch: Fetch, server: FileServer, tmp_path: Path) -> None:
    server.codes = [503, 429]
    fetch()
    assert target(tmp_path).read_bytes() == CONTENT
    target(tmp_path).unlink()
    server.codes = [503, 503, 503]
    with pytest.raises(UserError, match=r"the server answers 503 .*3 times in succession"):
        fetch()


def test_a_silent_server_is_given_up(fetch: Fetch, server: FileServer) -> None:
    server.silent = 0.3
    with pytest.raises(UserError, match=r"the server is silent or closes the connection \(.*timed out.*\), 3 times"):
        fetch(timeout=0.05)
    server.silent = 0.01
    fetch(timeout=5.0)


def test_without_a_network_one_sentence_names_address_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        refused = f"http://127.0.0.1:{free.getsockname()[1]}/a.pth"

        def no_names(*_: object, **__: object) -> None:
            raise socket.gaierror(-3, "Temporary failure in name resolution")

        for address, reason in ((refused, "refused"), ("http://weights.invalid/a.pth", "name resolution")):
            with pytest.raises(
                UserError, match=rf"{address} .*no connection: .*{reason}.*put it at {target(tmp_path)}"
            ):
                download.fetch(address, target(tmp_path), None, report=print)
            monkeypatch.setattr(socket, "getaddrinfo", no_names)


def test_a_folder_that_cannot_be_written_is_one_sentence(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match=r"a\.pth cannot be written \(File exists\); make room"):
        download.fetch(f"{server.address}/a.pth", target(tmp_path), None, report=print)


def test_while_another_process_downloads_the_file_is_awaited(
    server: FileServer, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts: list[Path] = []

    @contextmanager
    def held_twice(folder: Path) -> Iterator[None]:
        attempts.append(folder)
        if len(attempts) < 3:
            raise InUseError("held")
        target(tmp_path).write_bytes(CONTENT)  # by the other process
        yield

    monkeypatch.setattr(download, "lock", held_twice)
    monkeypatch.setattr(download, "WAIT", 0.0)
    assert fetch() == [f"waiting for another process that downloads to {tmp_path / 'cache'}"]
    assert not server.requests and len(attempts) == 3
