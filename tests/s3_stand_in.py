"""A bucket over HTTP on this machine: as much of S3's protocol as reading needs (HeadObject, GetObject with a range, ListObjectsV2)."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

STAMP = "Wed, 01 Jan 2025 00:00:00 GMT"


def listing(objects: dict[str, bytes], prefix: str) -> bytes:
    contents = "".join(
        f"<Contents><Key>{key}</Key><Size>{len(body)}</Size><LastModified>2025-01-01T00:00:00.000Z</LastModified><ETag>x</ETag></Contents>"
        for key, body in sorted(objects.items())
        if key.startswith(prefix)
    )
    count = contents.count("<Key>")
    return f"<?xml version='1.0'?><ListBucketResult><KeyCount>{count}</KeyCount><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>".encode()


def handler_of(bucket: str, objects: dict[str, bytes]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            url = urlsplit(self.path)
            name, _, key = unquote(url.path).removeprefix("/").partition("/")
            if name != bucket:
                self.send(404, b"<Error><Code>NoSuchBucket</Code></Error>")
            elif not key:
                self.send(200, listing(objects, parse_qs(url.query).get("prefix", [""])[0]))
            elif key not in objects:
                self.send(404, b"<Error><Code>NoSuchKey</Code></Error>")
            elif "Range" in self.headers:
                first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
                self.send(206, objects[key][int(first) : int(last) + 1])
            else:
                self.send(200, objects[key])

        do_GET = do_HEAD = answer

        def send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            for name, value in (("Content-Length", str(len(body))), ("Last-Modified", STAMP), ("ETag", '"x"'), ("Content-Type", "application/xml")):
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler


@contextmanager
def served_bucket(bucket: str, objects: dict[str, bytes]) -> Iterator[str]:
    """Yields what follows the path in a URI: s3://<bucket>/<key>?<options>."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(bucket, objects))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"endpoint_override=127.0.0.1:{server.server_port}&scheme=http&region=us-east-1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
