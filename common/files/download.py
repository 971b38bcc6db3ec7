"""Download files. Interrupted downloads are resumed, and the SHA-256 of each file is verified."""

import contextlib
import hashlib
import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files.lines import sync_folder
from common.files.lock import InUseError, lock

BLOCK = 1 << 20  # maximum number of bytes per read
FAILURES = 3  # a download fails after this many successive attempts that receive no bytes
PAUSE = 1.0  # seconds to wait after an attempt that receives no bytes; doubled after each successive one
WAIT = 0.2  # seconds between two attempts to take the lock that another process holds
RETRIED = (408, 429, 500, 502, 503, 504)  # HTTP status codes of temporary failures

Report = Callable[[str], None]


class DownloadError(UserError):
    """A file could not be downloaded or written, or its SHA-256 is not the published one."""


class _NothingReceived(Exception):
    """An attempt to download ended with an error that may be temporary; some bytes may have been received before it."""


def fetch(address: str, path: Path, digits: str | None, *, report: Report, timeout: float = 30.0) -> None:
    """Download the file at `address` to `path` unless `path` exists, and verify its SHA-256.

    `digits` are the first hexadecimal digits of the published SHA-256; None skips the verification. A file that already
    exists at `path` is verified, too. `report` is called with lines of text for the user. An attempt fails if the
    server sends nothing for `timeout` seconds.

    A download that was interrupted, even in an earlier process, is resumed if the file at the address has not changed
    and the server supports range requests. Only one process at a time downloads to a folder; other processes wait.
    Raises DownloadError if the file cannot be downloaded or written, or if it has another SHA-256.
    """
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _waiting_for_lock(path.parent, report):
                if not path.exists():
                    report(f"downloading {address} to {path}")
                    _download(address, path, digits, report, timeout)
                    return
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(
                f"{path} cannot be written ({error.strerror}); make room, or name another folder."
            ) from error
    if digits and not (sha256 := _sha256(path)).startswith(digits):
        raise DownloadError(
            f"{path} has the SHA-256 {sha256}, and the published file has {digits}...; delete it to download it again "
            f"from {address}."
        )


@contextlib.contextmanager
def _waiting_for_lock(folder: Path, report: Report) -> Iterator[None]:
    """Wait until no other process downloads to `folder`, then lock it until the context ends."""
    waited = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock(folder))
                break
            except InUseError:
                if not waited:
                    report(f"waiting for another process that downloads to {folder}")
                waited = True
                time.sleep(WAIT)
        yield


def _download(address: str, path: Path, digits: str | None, report: Report, timeout: float) -> None:
    """Download to a draft file beside `path`, verify its SHA-256, and rename the draft to `path`."""
    draft, failures = path.with_name(f".{path.name}.part"), 0
    while True:
        before = _size(draft)
        try:
            complete = _receive(address, draft, timeout)
        except _NothingReceived as error:
            complete, reason = False, str(error)
        except urllib.error.HTTPError as error:
            raise _failure(address, path, f"the server answers {error.code} {error.reason}") from error
        except urllib.error.URLError as error:
            raise _failure(address, path, f"no connection: {error.reason}") from error
        else:
            reason = "the connection was cut"
        if complete:
            break
        failures = 0 if _size(draft) > before else failures + 1
        if failures == FAILURES:
            part = f"; {_size(draft):,} bytes are kept, and the same command continues from there" * bool(_size(draft))
            raise _failure(address, path, f"{reason}, {FAILURES} times in succession{part}")
        if failures:
            time.sleep(PAUSE * 2 ** (failures - 1))
    sha256 = _sha256(draft)
    if digits and not sha256.startswith(digits):
        _discard(draft)
        raise _failure(address, path, f"the file has the SHA-256 {sha256}, and the published file has {digits}...")
    os.replace(draft, path)
    sync_folder(path.parent)
    _discard(draft)
    report(f"received  {path.name}: {path.stat().st_size:,} bytes, SHA-256 {sha256}" + " as published" * bool(digits))


def _receive(address: str, draft: Path, timeout: float) -> bool:
    """Receive the rest of the file at `address` into `draft`; returns whether `draft` is then complete.

    A second file beside the draft stores the size of the complete file, and the server's ETag or Last-Modified header.
    If the server sends other values when a download is resumed, the file at the address has changed, and the draft is
    deleted. If the server does not support range requests, the draft is overwritten from its beginning. Raises
    _NothingReceived after an error that may be temporary.
    """
    start = _size(draft)
    if start and _content(draft).startswith(f"{start} "):
        return True
    request = urllib.request.Request(address, headers={"User-Agent": "triptych"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            length = response.headers.get("Content-Length")
            resumes = response.status == 206
            size = None if length is None else int(length) + (start if resumes else 0)
            content = f"{size} {response.headers.get('ETag') or response.headers.get('Last-Modified')}"
            if resumes and content != _content(draft):
                _discard(draft)
                return False
            _content_file(draft).write_text(content, encoding="utf-8")
            with open(draft, "ab" if resumes else "wb") as file:
                _copy(response, file)
                os.fsync(file.fileno())
            return size is None or _size(draft) == size
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the draft is at least as long as the file at the address
            _discard(draft)
        elif error.code not in RETRIED:
            raise
        raise _NothingReceived(f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        if not isinstance(error.reason, TimeoutError | ConnectionResetError):
            raise
        raise _NothingReceived(f"the server is silent or closes the connection ({error.reason})") from error
    except (TimeoutError, ConnectionError, http.client.HTTPException) as error:
        raise _NothingReceived(f"the server is silent or closes the connection ({error})") from error


def _copy(response: Any, file: Any) -> None:
    # `read1` returns the bytes that have arrived. `read` would wait for a whole block, and if the connection was cut
    # meanwhile, the part that had arrived would be lost.
    while block := response.read1(BLOCK):
        file.write(block)


def _content(draft: Path) -> str:
    """The content of the second file beside `draft` (see `_receive`); empty if there is no such file."""
    file = _content_file(draft)
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _content_file(draft: Path) -> Path:
    return draft.with_name(f"{draft.name}.of")


def _discard(draft: Path) -> None:
    draft.unlink(missing_ok=True)
    _content_file(draft).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _failure(address: str, path: Path, reason: str) -> DownloadError:
    remedy = f"try again later, or download that file elsewhere and put it at {path}"
    return DownloadError(f"{address} could not be downloaded ({reason}); {remedy}.")
