"""Local S3 server (moto) in this process, on a port that it chooses itself, and buckets in it."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bucket:
    """Bucket of the local server.

    Attributes:
        url: such as ``s3://bucket-1f``.
        environment: variables by which s3fs finds the server.
        filesystem: client of the server.
    """

    url: str
    environment: dict[str, str]
    filesystem: Any

    def names(self, below: str = "") -> list[str]:
        """Return the sorted names of all objects, without the bucket's."""
        self.filesystem.invalidate_cache()
        prefix = self.url.removeprefix("s3://")
        return sorted(name.removeprefix(f"{prefix}/") for name in self.filesystem.find(f"{prefix}/{below}".rstrip("/")))

    def read(self, name: str) -> bytes:
        """Return the content of an object."""
        return bytes(self.filesystem.cat_file(f"{self.url}/{name}"))


def server_environment(port: int) -> dict[str, str]:
    """Return the variables by which s3fs finds a server on a port of this machine."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        # No look-up of credentials at addresses of a cloud.
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def make_bucket(environment: dict[str, str]) -> Bucket:
    """Make a bucket with a new name; the variables must be set."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    filesystem = s3fs.S3FileSystem()
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    filesystem.mkdir(name)
    return Bucket(f"s3://{name}", environment, filesystem)
