"""Who is at the other end of HTTP: servers that follow a script, nginx, and ours."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Act = Callable[[socket.socket], None]


def needed(program: str, package: str) -> str:
    found = shutil.which(program) or shutil.which(program, path="/usr/sbin")
    if found is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent(f"needs {program}, from Debian's package {package}")
    assert found is not None
    return found


def read_request(sock: socket.socket) -> bytes:
    """The head of a request; its body is read too."""
    came = b""
    while b"\r\n\r\n" not in came:
        piece = sock.recv(1 << 16)
        if not piece:
            return came
        came += piece
    head, _, body = came.partition(b"\r\n\r\n")
    match = re.search(rb"(?i)content-length: *(\d+)", head)
    left = (int(match[1]) if match else 0) - len(body)
    while left > 0 and (piece := sock.recv(min(left, 1 << 20))):
        left -= len(piece)
    return head


class Scripted:
    """A server whose n-th connection is met by the n-th act, and later ones by the last.

    Bytes stand for: read the request, answer that, hang up.
    """

    def __init__(self, *acts: bytes | Act) -> None:
        self._acts = acts
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=200)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/vm"
        self.heads: list[bytes] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._open: list[socket.socket] = []

    def __enter__(self) -> Scripted:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._threads[0].join()
        for sock in self._open:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        count = 0
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            act = self._acts[min(count, len(self._acts) - 1)]
            count += 1
            self._open.append(sock)
            thread = threading.Thread(target=self._meet, args=(sock, act))
            self._threads.append(thread)
            thread.start()

    def _meet(self, sock: socket.socket, act: bytes | Act) -> None:
        with closing(sock), suppress(OSError):
            if isinstance(act, bytes):
                self.heads.append(read_request(sock))
                sock.sendall(act)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(1 << 16):
                    pass
            else:
                act(sock)


def answer(status: str, body: bytes = b"", **headers: str) -> bytes:
    lines = {"content_length": str(len(body)), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def hang(sock: socket.socket) -> None:
    """Wait until the other side hangs up."""
    with suppress(OSError):
        while sock.recv(1 << 16):
            pass


@contextmanager
def serving(
    folder: Path, *options: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``vmmig serve`` in a process of its own: its URL, and the process."""
    process = subprocess.Popen(
        [
            *(*prefix, sys.executable, "-m", "vmmig.cli"),
            *("serve", str(folder), "--port", "0", *options),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            if not url:
                assert process.stderr is not None
                pytest.fail(process.stderr.read())
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


@contextmanager
def nginx(folder: Path) -> Iterator[tuple[str, Path]]:
    """nginx with ``dav_methods PUT``: its URL, and where its files are."""
    program = needed("nginx", "nginx-light")
    root = folder / "www"
    root.mkdir()
    for path in (folder, root):
        path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    temporary = "".join(
        f"{name}_temp_path {folder}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(
        f"""{user} daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}
        http {{ access_log off; client_max_body_size 0; {temporary}
        server {{ listen 127.0.0.1:{port}; root {root};
        location / {{ dav_methods PUT; }} location /small/ {{ client_max_body_size 10; }} }} }}"""
    )
    process = subprocess.Popen(
        [program, "-e", f"{folder}/log", "-c", f"{folder}/nginx.conf"], stderr=subprocess.DEVNULL
    )
    with process:
        try:
            yield f"http://127.0.0.1:{port}/", root
        finally:
            process.terminate()
            process.wait(60)


def certificates(folder: Path) -> Path:
    """A folder with an authority, and certificates of it for a server at 127.0.0.1 and a client."""
    program = needed("openssl", "openssl")
    folder.mkdir()

    def run(*arguments: str) -> None:
        subprocess.run([program, *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    run(
        *("req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem"),
        *("-subj", "/CN=authority", "-days", "2"),
        *("-addext", "keyUsage=critical,keyCertSign"),
    )
    for side in ("server", "client"):
        run("req", *key, "-keyout", f"{side}-key.pem", "-out", "request", "-subj", f"/CN={side}")
        (folder / "extensions").write_text("subjectAltName=IP:127.0.0.1")
        run(
            *("x509", "-req", "-in", "request", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"),
            *("-CAcreateserial", "-days", "2", "-extfile", "extensions"),
            *("-out", f"{side}-cert.pem"),
        )
        (folder / f"{side}-key.pem").chmod(0o600)
    return folder
