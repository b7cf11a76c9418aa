"""S3 servers for tests, in this process: moto, and others that answer as no server should.

Their address reaches other processes through the environment.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec


@contextlib.contextmanager
def bucket(name: str = "lorasuite") -> Iterator[str]:
    """The address of an empty bucket, ``s3://…``, that botocore finds without being told where the server is."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {key: os.environ.get(key) for key in settings}
    os.environ.update(settings)
    try:
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        server.stop()


class _Answers(BaseHTTPRequestHandler):
    """What :func:`answering` makes of a request; nothing is logged."""

    answer: Callable[[str], bytes | None]

    def do_GET(self) -> None:
        """The object, or that there is none."""
        content = type(self).answer(self.path.partition("?")[0])
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        """Nothing is deleted."""
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Not on standard error."""


@contextlib.contextmanager
def answering(answer: Callable[[str], bytes | None]) -> Iterator[None]:
    """Inside, S3 is a server that answers each path ``/bucket/name`` as this says, in place of :func:`bucket`'s."""
    handler = type("Answers", (_Answers,), {"answer": staticmethod(answer)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before = os.environ["AWS_ENDPOINT_URL"]
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    try:
        yield
    finally:
        os.environ["AWS_ENDPOINT_URL"] = before
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        server.shutdown()
        server.server_close()
