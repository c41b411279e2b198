"""Azurite, Microsoft's emulator of Azure Blob Storage. An npm package: on PATH, or where AZURITE says."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path
from typing import Any

from tests.lanes.processes import ObjectServer, find_program, free_port

_FIX = "npm install -g azurite, or set AZURITE to the path of its azurite-blob"
_ACCOUNT = "lane"


class Azurite(ObjectServer):
    """A server of its own data, port and credentials. See ObjectServer."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        key = base64.b64encode(secrets.token_bytes(64)).decode()
        place = f"http://127.0.0.1:{port}/{_ACCOUNT}"
        self._connection = (
            f"DefaultEndpointsProtocol=http;AccountName={_ACCOUNT};AccountKey={key};BlobEndpoint={place};"
        )
        self.environment = {"AZURE_STORAGE_CONNECTION_STRING": self._connection}
        program = os.environ.get("AZURITE") or find_program("azurite-blob", fix=_FIX)
        options = ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
        options += ["--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
        accounts = {"AZURITE_ACCOUNTS": f"{_ACCOUNT}:{key}"}
        super().__init__([program, *options], log=folder / "azurite.log", environment=accounts)

    def make_bucket(self, name: str) -> str:
        """See ObjectServer; Azure calls it a container."""
        with self._service() as service:
            service.create_container(name)
        return f"az://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """See ObjectServer."""
        with self._service() as service:
            service.get_blob_client(bucket, key).upload_blob(data, overwrite=True)

    def tree(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """See ObjectServer."""
        root = prefix.rstrip("/") + "/"
        with self._service() as service:
            container = service.get_container_client(bucket)
            names = list(container.list_blob_names(name_starts_with=root))
            return {name.removeprefix(root): container.download_blob(name).readall() for name in names}

    def _service(self) -> Any:
        from azure.storage.blob import BlobServiceClient

        return BlobServiceClient.from_connection_string(
            self._connection, retry_total=0, connection_timeout=5, read_timeout=60
        )

    def _ask(self) -> None:
        with self._service() as service:
            list(service.list_containers())
