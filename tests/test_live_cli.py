"""Live migration from the command line: real processes, a small guest, and a page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest

from vmmig.adapters import guest
from vmmig.cli.report import page

pytest.importorskip("unicorn")

MIB = 1 << 20
SMALL = ["--ram-mib", "2", "--rounds", "3"]
DIGEST = guest.expected_digest(2 * MIB, 3)


def vmmig(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmmig.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


class Receiver:
    """`vmmig receive` in a process of its own."""

    def __init__(self, url: str, *arguments: object) -> None:
        command = [sys.executable, "-m", "vmmig.cli", "receive", url, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.url = self.process.stderr.readline().strip().removeprefix("listening at ")

    def ended(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


def test_the_live_demo_moves_a_computing_machine_between_processes() -> None:
    result = vmmig("demo", "--live", *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert facts["ok"]
    assert facts["digest"] == facts["hashlib"] == DIGEST
    assert facts["pid"] != facts["resumed_by_pid"]
    assert facts["report"]["downtime"]["total_s"] > 0
    assert "Downtime" in result.stderr


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_a_machine_is_moved_by_two_commands(scheme: str, tmp_path: Path) -> None:
    receiver = Receiver(
        "tcp:127.0.0.1:0" if scheme == "tcp" else f"unix:{tmp_path}/s",
        "--record",
        tmp_path / "record.json",
    )
    report = tmp_path / "migration.html"
    sent = vmmig(
        "migrate", receiver.url, *SMALL, "--after", 0.2, "--connections", 2, "--report", report
    )
    assert sent.returncode == 0, sent.stderr
    status, out, err = receiver.ended()
    assert status == 0, err
    assert f"digest {DIGEST}\npower off\n" in out
    assert "moved 2 MiB of RAM" in sent.stdout
    assert ("handed over" in sent.stdout) == (scheme == "unix")
    assert "COMMITTED" in (tmp_path / "record.json").read_text()
    assert "<svg" in report.read_text()


def test_json_is_lines_of_progress_and_the_record() -> None:
    receiver = Receiver("tcp:127.0.0.1:0", "--json")
    sent = vmmig("migrate", receiver.url, *SMALL, "--after", 0.1, "--json")
    assert sent.returncode == 0, sent.stderr
    *progress, record = map(json.loads, sent.stdout.splitlines())
    assert {"connecting", "done"} <= {line["stage"].split()[0] for line in progress}
    assert record["ram_bytes"] == 2 * MIB
    status, out, _ = receiver.ended()
    assert status == 0
    assert DIGEST in json.loads(out)["console"]


def test_what_cannot_be_moved_runs_on_here() -> None:
    result = vmmig("migrate", "unix:/nobody/is/here", *SMALL, "--after", 0, "--timeout", 0.1)
    assert result.returncode == 1
    assert f"digest {DIGEST}\npower off\n" in result.stdout
    assert "the machine runs on here" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_receiver_that_is_interrupted_ends_at_once(tmp_path: Path) -> None:
    receiver = Receiver(f"unix:{tmp_path}/s")
    receiver.process.send_signal(signal.SIGINT)
    status, _, err = receiver.ended()
    assert status == 130
    assert "cancelled" in err
    assert not (tmp_path / "s").exists()


def test_a_policy_is_simulated(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("duration_s,dirty_bytes_per_s,working_set_bytes\n60,100000000,1000000000\n")
    result = vmmig("simulate", trace, "--memory", "4GiB", "--bandwidth", "1G")
    assert result.returncode == 0, result.stderr
    assert "downtime" in result.stdout
    trace.write_text("nonsense\n")
    result = vmmig("simulate", trace, "--memory", "4GiB", "--bandwidth", "1G")
    assert result.returncode == 1
    assert "line 1" in result.stderr
    assert vmmig("simulate", trace, "--memory", "much", "--bandwidth", "1G").returncode == 2


def record() -> dict[str, Any]:
    parts = ("pause", "state", "final_memory", "send_state", "complete")
    downtime = {f"{name}_s": 0.001 * (i + 1) for i, name in enumerate(parts)}
    return {
        "url": "tcp:<b>host</b>:9000",
        "ram_bytes": 4 << 30,
        "sent_bytes": 5 << 30,
        "connections": 4,
        "handed_over": False,
        "iterations": [
            {
                "iteration": i + 1,
                "sent_bytes": (4 << 30) >> (2 * i),
                "duration_s": 2.1 / 4**i,
                "dirty_bytes": (1 << 30) >> (2 * i),
                "elapsed_s": 1.0,
            }
            for i in range(6)
        ],
        "decision": {"reason": "1 MiB left: 1 ms of downtime expected, within </script> limit"},
        "downtime": downtime | {"total_s": 0.015},
        "total_s": 3.2,
    }


def test_the_report_is_a_page_that_a_browser_shows(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "chromium must be installed where everything is tested"
        pytest.skip("chromium is not installed (Debian's package chromium)")
    (tmp_path / "migration.html").write_text(page(record()))
    browser = [
        *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--window-size=900,1300", f"--user-data-dir={tmp_path}/profile"),
    ]
    url = f"file://{tmp_path}/migration.html"
    dumped = subprocess.run(
        [*browser, "--dump-dom", url], capture_output=True, text=True, timeout=90, check=True
    ).stdout
    assert len(re.findall('class="bar"', dumped)) == 12
    assert len(re.findall('class="part"', dumped)) == 5
    assert len(re.findall("<circle", dumped)) == 6
    assert "tcp:&lt;b&gt;host&lt;/b&gt;:9000" in dumped
    subprocess.run(
        [*browser, f"--screenshot={tmp_path}/page.png", url],
        capture_output=True,
        timeout=90,
        check=True,
    )
    width, height, rows = pixels((tmp_path / "page.png").read_bytes())
    assert (width, height) == (900, 1300)
    for colour in ("4269d0", "ff725c", "3ca951", "efb118", "a463f2"):
        assert any(bytes.fromhex(colour) in row for row in rows), colour


def pixels(png: bytes) -> tuple[int, int, list[bytes]]:
    """A PNG's size, and its rows of RGB or RGBA pixels, alpha left out."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at, data = 8, b""
    width = height = channels = 0
    while at < len(png):
        length, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        content = png[at + 8 : at + 8 + length]
        if kind == b"IHDR":
            width, height = (int.from_bytes(content[i : i + 4], "big") for i in (0, 4))
            channels = {2: 3, 6: 4}[content[9]]
        elif kind == b"IDAT":
            data += content
        at += 12 + length
    raw = zlib.decompress(data)
    stride = width * channels
    rows: list[bytes] = []
    before = bytes(stride)
    for y in range(height):
        method, line = raw[y * (stride + 1)], bytearray(raw[y * (stride + 1) + 1 :][:stride])
        for x in range(stride):
            a = line[x - channels] if x >= channels else 0
            b = before[x]
            c = before[x - channels] if x >= channels else 0
            if method == 1:
                line[x] = (line[x] + a) & 255
            elif method == 2:
                line[x] = (line[x] + b) & 255
            elif method == 3:
                line[x] = (line[x] + (a + b) // 2) & 255
            elif method == 4:
                nearest = min((abs(b - c), 0, a), (abs(a - c), 1, b), (abs(a + b - 2 * c), 2, c))
                line[x] = (line[x] + nearest[2]) & 255
        before = bytes(line)
        rows.append(
            before if channels == 3 else b"".join(before[i : i + 3] for i in range(0, stride, 4))
        )
    return width, height, rows
