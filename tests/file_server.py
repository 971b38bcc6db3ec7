"""A server on the loopback address that sends files whole, cut, late or not at all, for tests of downloads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FileServer:
    """The files of a server by path, and how it fails; `requests` are the paths and Range headers that it received."""

    def __init__(self, port: int):
        self.address = f"http://127.0.0.1:{port}"
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.cut_after: list[int] = []  # bytes that the next answers send before they close the connection
        self.codes: list[int] = []  # of the next answers, instead of 200 or 206
        self.silent = 0.0  # seconds before each answer
        self.ranges = True
        self.requests: list[tuple[str, str | None]] = []


@contextmanager
def serving() -> Iterator[FileServer]:
    """Start a server, and stop it at the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            server.requests.append((self.path, self.headers.get("Range")))
            time.sleep(server.silent)
            content = server.files.get(self.path)
            code = server.codes.pop(0) if server.codes else 200 if content is not None else 404
            if code != 200 or content is None:
                self.send_error(code)
                return
            start = 0
            if server.ranges and (header := self.headers.get("Range")):
                start = int(header.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    self.send_error(416)
                    return
                code = 206
            self.send_response(code)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", server.tags.get(self.path, '"1"'))
            self.end_headers()
            stop = start + server.cut_after.pop(0) if server.cut_after else len(content)
            with suppress(ConnectionError):  # a client that has given up
                self.wfile.write(content[start:stop])

        def log_message(self, *arguments: Any) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = FileServer(http_server.server_port)
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()
