"""What a hostile peer can make a receiver take, with a limit of 16 MiB: measured on a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import resource, socket, sys, threading
from vmmig import Limits, MigrateReceiveError, recv

MIB = 1 << 20
endless = bytes(range(256)) * 4096


def http(sock):
    sock.recv(1 << 16)
    if sys.argv[1] == "chunked":
        sock.sendall(b"HTTP/1.1 200 OK\\r\\nTransfer-Encoding: chunked\\r\\n\\r\\n")
        while True:
            sock.sendall(b"%x\\r\\n" % MIB + endless + b"\\r\\n")
    length = {"long": 1 << 62, "close": None}[sys.argv[1]]
    head = b"HTTP/1.1 200 OK\\r\\n"
    head += b"Connection: close\\r\\n" if length is None else b"Content-Length: %d\\r\\n" % length
    sock.sendall(head + b"\\r\\n")
    while True:
        sock.sendall(endless)


def serve(server):
    while True:
        sock, _ = server.accept()
        try:
            http(sock)
        except OSError:
            sock.close()


server = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=serve, args=(server,), daemon=True).start()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
url = f"http://127.0.0.1:{server.getsockname()[1]}/vm"
for _ in range(3):
    try:
        recv(url, limits=Limits(max_bytes=16 * MIB), timeout_s=1)
    except MigrateReceiveError as error:
        print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
@pytest.mark.parametrize("body", ["chunked", "long", "close"])
def test_an_endless_body_takes_no_more_than_the_limit_warrants(body: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", CHILD, body], capture_output=True, text=True, timeout=60, check=True
    )
    *errors, grown_mib = ended.stdout.splitlines()
    assert len(errors) == 3, ended.stdout
    assert int(grown_mib) < 3 * 16 + 24, ended.stdout
