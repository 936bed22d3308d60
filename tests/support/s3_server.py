"""An S3 server on this machine: moto's, on loopback and in memory."""

import json
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import boto3
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3Server:
    """A running server. Its endpoint has the form http://127.0.0.1:port."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables by which a process reaches the server with s3:// URIs."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": self.endpoint}

    @property
    def options(self) -> str:
        """The options after the ? of an s3:// URI that reaches this server without environment variables."""
        return f"endpoint_override={self.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"

    def put(self, bucket: str, objects: Mapping[str, bytes]) -> None:
        """Put the objects into a bucket, which is made if it is missing."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for key, body in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=body)

    def keys(self, bucket: str) -> list[str]:
        """Return the keys of all objects, without the empty objects by which pyarrow marks folders."""
        entries = self.client().list_objects_v2(Bucket=bucket).get("Contents", [])
        return sorted(entry["Key"] for entry in entries if not entry["Key"].endswith("/"))

    def client(self):  # noqa: ANN201  (boto3 makes its classes at run time)
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )


@contextmanager
def s3_server() -> Iterator[S3Server]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    try:
        urllib.request.urlopen(
            urllib.request.Request(f"{endpoint}/moto-api/reset", data=json.dumps({}).encode(), method="POST")
        ).read()
        yield S3Server(endpoint)
    finally:
        server.stop()
