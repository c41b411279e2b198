"""SeaweedFS, a real S3 server: signatures checked, multipart uploads, conditional writes that are atomic."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.lanes.processes import ObjectServer, find_program, free_port

_GRPC_ABOVE = 10_000
_FIX = "make test-s3 installs it; by hand: pip install -e '.[lanes]' -c constraints.txt"


class SeaweedFS(ObjectServer):
    """A server of its own data, ports and credentials. See ObjectServer."""

    def __init__(
        self,
        folder: Path,
        *,
        access_key: str | None = None,
        secret_key: str | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port(companion=_GRPC_ABOVE)
        self.url = f"http://{host}:{port}"
        self.access_key = access_key or f"LANE{secrets.token_hex(8).upper()}"
        self.secret_key = secret_key or secrets.token_hex(20)
        self.environment = self.environment_at(self.url)
        options = {
            "dir": str(folder / "data"),
            "ip": host,
            "ip.bind": host,
            "s3.port": str(port),
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": "0",
            "s3.port.lance": "0",
            "admin.ui": "false",
            "webdav": "false",
            "master.telemetry": "false",
            # Every bucket takes several volumes, and there are as many as fit on the disk at full size.
            "master.volumeSizeLimitMB": "16",
        }
        for name in ("master", "volume", "filer"):
            options[f"{name}.port"] = str(free_port(companion=_GRPC_ABOVE))
        self._filer = f"http://{host}:{options['filer.port']}"
        (folder / "data").mkdir(exist_ok=True)
        command = [find_program("weed", fix=_FIX), f"-logdir={folder}", "mini"]
        super().__init__(
            [*command, *(f"-{name}={value}" for name, value in options.items())],
            log=folder / "weed.log",
            environment={"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key},
        )

    def environment_at(self, url: str, **changes: str) -> Mapping[str, str]:
        """The environment of a client that takes `url` for the store, with other variables changed."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Nothing of the machine the tests run on.
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            **changes,
        }

    def client(self) -> Any:
        """botocore's own client, with credentials given to it directly."""
        import botocore.session
        from botocore.config import Config

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=60),
        )

    def make_bucket(self, name: str) -> str:
        """See ObjectServer."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, bucket: str, key: str, data: bytes) -> None:
        """See ObjectServer."""
        self.client().put_object(Bucket=bucket, Key=key, Body=data)

    def put_folder(self, bucket: str, folder: Path) -> None:
        """Put a folder and all below it, under the folder's own name: many small files sooner than by S3."""
        command = [find_program("weed", fix=_FIX), "filer.copy", "-c=16", str(folder)]
        subprocess.run([*command, f"{self._filer}/buckets/{bucket}/"], check=True, capture_output=True)

    def names(self, bucket: str, prefix: str = "") -> list[str]:
        """Every object's key that begins with `prefix`."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def tree(self, bucket: str, prefix: str) -> dict[str, bytes]:
        """See ObjectServer."""
        client, root = self.client(), prefix.rstrip("/") + "/"
        return {
            key.removeprefix(root): client.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in self.names(bucket, root)
        }

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """Keys of multipart uploads that were begun and neither completed nor given up."""
        return [
            found["Key"] for found in self.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ())
        ]

    def drop_bucket(self, name: str) -> None:
        """Delete a bucket with everything in it."""
        client = self.client()
        for key in self.names(name):
            client.delete_object(Bucket=name, Key=key)
        client.delete_bucket(Bucket=name)

    def _ask(self) -> None:
        self.client().list_buckets()
