"""Send bytes to another process over tcp, unix and TLS, against the bare socket; hand over RAM."""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.timing import ms, table
from vmmig import tls, transport
from vmmig.sealed import sealed_copy

MIB = 1 << 20
WAYS = ("tcp", "unix", "tls")


def certificates(folder: str) -> None:
    """A CA of one hour, and a certificate for each side, by openssl."""

    def openssl(*arguments: str) -> None:
        subprocess.run(("openssl", *arguments), cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl("req", "-x509", *key, "-keyout", "ca.pem", "-out", "ca-cert.pem", "-subj", "/CN=CA")
    Path(folder, "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for side in ("client", "server"):
        openssl(
            *("req", *key, "-keyout", f"{side}-key.pem", "-out", "request", "-subj", f"/CN={side}")
        )
        openssl(
            *("x509", "-req", "-in", "request", "-CA", "ca-cert.pem", "-CAkey", "ca.pem"),
            *("-CAcreateserial", "-extfile", "names", "-out", f"{side}-cert.pem"),
        )
        Path(folder, f"{side}-key.pem").chmod(0o600)


def memory(size_bytes: int) -> memoryview:
    return memoryview(mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def receive_bare(way: str, folder: str, size_bytes: int, told: Callable[[str], None]) -> None:
    """Into fresh memory, by recv_into; one byte tells the other side that all is there."""
    path = f"{folder}/bare"
    with socket.socket(socket.AF_UNIX if way == "unix" else socket.AF_INET) as listener:
        listener.bind(path if way == "unix" else ("127.0.0.1", 0))
        listener.listen()
        told(path if way == "unix" else str(listener.getsockname()[1]))
        sock, _ = listener.accept()
    if way == "unix":
        os.unlink(path)
    if way == "tls":
        sock = tls.server_context(folder).wrap_socket(sock, server_side=True)
    with sock:
        view = memory(size_bytes)
        while view:
            view = view[sock.recv_into(view[: 16 * MIB]) :]
        sock.sendall(b"!")


def send_bare(way: str, folder: str, place: str, payload: memoryview) -> None:
    sock = socket.socket(socket.AF_UNIX if way == "unix" else socket.AF_INET)
    sock.connect(place if way == "unix" else ("127.0.0.1", int(place)))
    if way == "tls":
        sock = tls.client_context(folder).wrap_socket(sock, server_hostname="127.0.0.1")
    with sock:
        for start in range(0, len(payload), MIB):
            sock.sendall(payload[start : start + MIB])
        assert sock.recv(1) == b"!"


def url_of(way: str, folder: str) -> str:
    return f"unix:{folder}/socket" if way == "unix" else "tcp:127.0.0.1:0"


def receive(way: str, folder: str, told: Callable[[str], None]) -> None:
    """By vmmig; what the other side's `transport.send` awaits is the checked whole."""
    seen: set[str] = set()

    def tell(url: str, stage: str) -> None:
        if stage == "connecting" and not url.endswith(":0") and url not in seen:
            seen.add(url)
            told(url)

    options: transport.Options = {"tls": folder} if way == "tls" else {}
    attached: list[memoryview] = []
    transport.recv(
        url_of(way, folder),
        attached=attached,
        progress=lambda event: tell(event.url, event.stage),
        **options,
    )


def serve(pipe: Connection, folder: str, size_bytes: int) -> None:
    """The other process: receives as it is told, until it is told nothing."""
    while order := pipe.recv():
        kind, way = order
        if kind == "bare":
            receive_bare(way, folder, size_bytes, pipe.send)
        else:
            receive(way, folder, pipe.send)
        gc.collect()
        pipe.send("done")


def main(*, quick: bool = False) -> None:
    size_bytes = (16 if quick else 1024) * MIB
    payload = memory(size_bytes)
    for start in range(0, size_bytes, MIB):
        payload[start : start + MIB] = os.urandom(MIB)
    with tempfile.TemporaryDirectory() as folder:
        certificates(folder)
        here, there = multiprocessing.Pipe()
        other = multiprocessing.get_context("fork").Process(
            target=serve, args=(there, folder, size_bytes)
        )
        other.start()

        def timed(kind: str, way: str, send: Callable[[str], None]) -> float:
            here.send((kind, way))
            place = here.recv()
            start = time.perf_counter()
            send(place)
            elapsed = time.perf_counter() - start
            assert here.recv() == "done"
            return elapsed

        def bare(way: str) -> float:
            return timed("bare", way, lambda place: send_bare(way, folder, place, payload))

        def ours(way: str) -> float:
            options: transport.Options = {"tls": folder} if way == "tls" else {}

            def send(place: str) -> None:
                transport.send([payload], place, total_bytes=size_bytes, **options)

            return timed("vmmig", way, send)

        times: dict[tuple[str, str], list[float]] = {}
        for _ in range(1 if quick else 7):
            for way in WAYS:
                times.setdefault(("bare", way), []).append(bare(way))
                times.setdefault(("vmmig", way), []).append(ours(way))
        rows: list[tuple[object, ...]] = []
        for way in WAYS:
            raw, own = (statistics.median(times[kind, way]) for kind in ("bare", "vmmig"))
            gib = size_bytes / (1 << 30)
            rows.append(
                (way, ms(raw), ms(own), f"{gib / raw:.2f}", f"{gib / own:.2f}", f"{raw / own:.2f}")
            )
        head = ("over", "sendall, ms", "vmmig.send, ms", "GiB/s", "GiB/s", "x sendall")
        print(table(f"Send {size_bytes // MIB} MiB to another process", head, rows))

        ram_bytes = (64 if quick else 2048) * MIB
        ram = sealed_copy(mmap.mmap(-1, ram_bytes))

        def hand_over(place: str) -> None:
            transport.send([b"index"], place, total_bytes=5, attached=[ram])

        series = [timed("vmmig", "unix", hand_over) for _ in range(2 if quick else 21)]
        rows = [("unix", ms(statistics.median(series[1:])))]
        print(table(f"Hand {ram_bytes // MIB} MiB over as a descriptor", ("over", "ms"), rows))
        here.send(None)
        other.join()


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
