"""PUT and GET between two processes, against http.client's own to the same server."""

from __future__ import annotations

import http.client
import mmap
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.timing import medians_s, ms, table
from vmmig import transport

MIB = 1 << 20


def main(*, quick: bool = False) -> None:
    size = 16 * MIB if quick else 1024 * MIB
    data = mmap.mmap(-1, size)
    block = os.urandom(MIB)
    for start in range(0, size, MIB):
        data[start : start + MIB] = block
        data[start : start + 8] = start.to_bytes(8, "little")
    # In memory where that can be, since the disk would hide what the network takes.
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "vmmig.cli", "serve", folder, "--port", "0"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            try:
                assert process.stdout is not None
                url = process.stdout.readline().strip() + "vm"
                compare(url, memoryview(data), rounds=1 if quick else 7)
            finally:
                process.terminate()


def compare(url: str, data: memoryview, *, rounds: int) -> None:
    where = urlsplit(url)

    def plain(method: str, body: memoryview | None = None) -> None:
        connection = http.client.HTTPConnection(where.hostname or "", where.port)
        connection.request(method, "/vm", body)
        answer = connection.getresponse()
        got = answer.read()
        assert answer.status < 300
        assert body is not None or len(got) == len(data)
        connection.close()

    def put() -> None:
        transport.send([data], url, total_bytes=len(data))

    def get() -> None:
        assert len(transport.recv(url)) == len(data)

    times = medians_s(
        {"plain PUT": lambda: plain("PUT", data), "PUT": put, "GET": get}
        | {"plain GET": lambda: plain("GET")},
        rounds=rounds,
    )
    rows: list[tuple[object, ...]] = []
    for method in ("PUT", "GET"):
        base = times[f"plain {method}"]
        rows.append((f"http.client, {method}", ms(base), "1.00"))
        mine = times[method]
        rows.append((f"vmmig, {method}", ms(mine), f"{base / mine:.2f}"))
    title = f"{len(data) // MIB} MiB to and from `vmmig serve`"
    print(table(title, ("how", "ms", "x http.client"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
