"""What tests of fetching need: a server whose answers can be told to go wrong, and looks into the cache."""

import contextlib
import http.server
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.remote import CacheConfig
from data_pipeline.remote_cache import RemoteFile


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `faults` are what the next answers get wrong, `asked` counts requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(Answer, directory=str(folder)))
        self.folder, self.asked = folder, Counter[str]()
        self.faults: list[Any] = []
        self.pause = 0.0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def write(self, name: str, data: bytes) -> str:
        """Put a file there; returns its URL."""
        (self.folder / name).write_bytes(data)
        return f"{self.url}/{name}"


class Answer(http.server.SimpleHTTPRequestHandler):
    """A file, or the fault that is next in line: a status, a body that is cut, endless, another, or without its
    length, a dropped connection."""

    server: Server

    def do_GET(self) -> None:
        self.server.asked[self.path] += 1
        fault = self.server.faults.pop(0) if self.server.faults else None
        time.sleep(self.server.pause)
        if isinstance(fault, int):
            self.send_error(fault)
        elif fault == "drop":
            self.close_connection = True
        elif fault == "cut":
            data = (self.server.folder / self.path[1:]).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
        elif fault == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                while True:
                    self.wfile.write(bytes(1 << 16))
        elif fault == "no length":
            self.send_response(200)
            self.end_headers()
            self.wfile.write((self.server.folder / self.path[1:]).read_bytes())
        elif isinstance(fault, bytes):
            self.send_response(200)
            self.send_header("Content-Length", str(len(fault)))
            self.end_headers()
            self.wfile.write(fault)
        else:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                super().do_GET()

    def log_message(self, *words: Any) -> None:
        pass


def cached(cache: CacheConfig) -> list[str]:
    """Names of the files in the cache, without the digest before them."""
    return sorted(path.name.partition("-")[2] for path in (Path(cache.folder) / "files").iterdir())


def content(file: RemoteFile) -> bytes:
    with file.open() as opened:
        return opened.read()
