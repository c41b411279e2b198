"""A plain web server for one folder, read-only: with ranges or without, open or for those with the query."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit


class FileServer(ThreadingHTTPServer):
    """Serves the files of `folder`. Use as a context manager.

    With `query` everything else is refused, as a presigned URL's store would. `asked` are the lines of all
    requests, without their queries.
    """

    daemon_threads = False

    def __init__(self, folder: Path, *, ranges: bool = True, query: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.query = folder, ranges, query
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path)
        self.server.asked.append(f"{self.command} {parts.path}")
        path = self.server.folder / parts.path.lstrip("/")
        if parts.query != self.server.query:
            self.send_error(403)
            return
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        start, end = 0, size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and self.server.ranges:
            start, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        if self.server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if with_body:
            with path.open("rb") as stream:
                stream.seek(start)
                self.wfile.write(stream.read(end - start))
