"""The page of `vmmig inspect --html`, in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html import unescape

import pytest
from click.testing import CliRunner

import vmmig
from tests.test_live_cli import pixels
from vmmig import Snapshot, SnapshotDataSection
from vmmig.cli.commands import vmmig as command
from vmmig.cli.snapshot_page import render
from vmmig.inspection import Opened

HOSTILE = "</script><script>document.title='owned'</script><!--"
MIB = 1 << 20
PAGE = 4096


def machine(later: bool) -> Snapshot:
    ram = bytearray(4 * MIB)
    ram[:MIB] = b"x" * MIB
    if later:
        ram[MIB // 2 : MIB] = b"y" * (MIB // 2)
    vm = Snapshot("vm")
    cpus = Snapshot("cpu-manager")
    vm.add_snapshot(cpus)
    for i in range(30):
        cpu = Snapshot(f"cpu{i}")
        regs = b'{"rip": %d, "wanted": "needle-%d"}' % (4096 + 16 * later, i)
        cpu.add_data_section(SnapshotDataSection("regs", regs))
        for k in range(6):
            cpu.add_data_section(SnapshotDataSection(f"msr{k}", bytes(range(60))))
        cpus.add_snapshot(cpu)
    vm.add_snapshot(Snapshot(HOSTILE, {}, {HOSTILE: SnapshotDataSection(HOSTILE, b"<img src=x>")}))
    vm.add_data_section(SnapshotDataSection("ram", bytes(ram)))
    return vm


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    for name, later in (("before", False), ("after", True)):
        vmmig.send(machine(later), folder / f"{name}.vmsnap")
    words = ["after.vmsnap", "--html", "page.html", "--against", "before.vmsnap"]
    words = ["inspect", *(str(folder / w) if w[0] != "-" else w for w in words)]
    result = CliRunner().invoke(command, words)
    assert (result.exit_code, result.output) == (0, "")
    return (folder / "page.html").read_text()


@pytest.fixture
def browser(tmp_path):
    chromium = shutil.which("chromium")
    if chromium is None:
        assert not os.environ.get("CI"), "chromium must be installed where everything is tested"
        pytest.skip("chromium is not installed (Debian's package chromium)")

    def show(text: str, *options: str) -> str:
        (tmp_path / "page.html").write_text(text)
        words = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--window-size=1200,900", f"--user-data-dir={tmp_path}/profile", *options),
            f"file://{tmp_path}/page.html",
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=90, check=True)
        return done.stdout

    return show


def acting(page: str, script: str) -> str:
    """The page with a user in it, who does what the script says and notes what is then shown."""
    helpers = """
    const $ = selector => document.querySelector(selector);
    const shown = () => [...document.querySelectorAll("[role=treeitem]")].map(e => e.textContent);
    const press = key => document.activeElement.dispatchEvent(
      new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    const note = (name, value) => {
      const e = document.createElement("output"); e.id = name; e.textContent = value;
      document.body.append(e); };
    """
    return page.replace("</body>", f"<script>{{{helpers}{script}}}</script></body>")


def noted(dom: str) -> dict[str, str]:
    return {
        name: unescape(value)
        for name, value in re.findall(r'<output id="(\w+)">(.*?)</output>', dom, re.DOTALL)
    }


def test_the_page_needs_nothing_and_obeys_nothing_in_it(page):
    assert not re.search(r"(https?:)?//[\w.]+\.\w+/|<link|<img|\bsrc=|@import", page)
    assert "default-src 'none'" in page
    assert page.count("</script>") == 2
    assert "<!--" not in page


def test_its_size_is_bounded():
    vm = Snapshot("vm")
    for i in range(3000):
        vm.add_snapshot(Snapshot(f"{i}", {}, {"a": SnapshotDataSection("a", bytes(60_000))}))
    assert len(render(Opened("vm", "vmmig", vm))) < 10 * MIB
    for i in range(25_000):
        vm.add_snapshot(Snapshot(f"node {i}"))
    page = render(Opened("vm", "vmmig", vm))
    assert len(page) < 12 * MIB
    assert '"left out here"' in page


def test_it_is_searched_and_opened_by_keyboard(page, browser):
    dom = browser(
        acting(
            page,
            """
            note("first", shown().join("|"));
            note("overview", $("#detail").textContent);
            press("/");
            note("focus", document.activeElement.id);
            $("#search").value = "NEEDLE-17";
            $("#search").dispatchEvent(new Event("input"));
            note("found", shown().join("|"));
            note("hits", $("#hits").textContent);
            press("Escape");
            $("[role=treeitem]").focus();
            press("ArrowDown");
            note("second", document.activeElement.textContent);
            while (!document.activeElement.textContent.includes("cpu-manager")) press("ArrowDown");
            press("ArrowRight");
            note("third", document.activeElement.textContent);
            const before = shown().length;
            press("ArrowRight");
            note("expanded", shown().length - before);
            note("state", document.activeElement.getAttribute("aria-expanded"));
            for (let i = 0; i < 6; i++) press("ArrowDown");
            note("hex", $("#detail").textContent);
            press("ArrowDown");
            note("fields", $("#detail").textContent);
            press("ArrowLeft"); press("ArrowLeft");
            note("closed", shown().length - before);
            note("title", document.title);
            """,
        ),
        "--dump-dom",
    )
    seen = noted(dom)
    assert "cpu-manager" in seen["first"]
    assert HOSTILE in seen["first"]
    assert "1024 pages of 4096 bytes, 768 zero (75.0 %), 128 changed (12.5 %)" in seen["overview"]
    assert "4096 (0x1000) -> 4112 (0x1010)" in seen["overview"]
    assert seen["focus"] == "search"
    assert "cpu17" in seen["found"]
    assert "cpu16" not in seen["found"]
    assert seen["hits"] == "1 hit"
    assert "ram" in seen["second"]
    assert "cpu0" in seen["third"]
    assert (seen["expanded"], seen["state"], seen["closed"]) == ("7", "true", "0")
    assert "00000010  10 11 12 13" in seen["hex"]
    assert "rip4112 (0x1010)was 4096 (0x1000)" in seen["fields"]
    assert seen["title"].endswith("after.vmsnap")


@pytest.mark.parametrize(
    ("options", "paper", "zero"),
    [
        ((), "ffffff", "d9dde3"),
        (("--blink-settings=preferredColorScheme=0",), "16181c", "2b3038"),
    ],
)
def test_it_looks_as_it_should(page, browser, tmp_path, options, paper, zero):
    browser(page, f"--screenshot={tmp_path}/page.png", *options)
    width, height, rows = pixels((tmp_path / "page.png").read_bytes())
    assert (width, height) == (1200, 900)
    for colour, least in ((zero, 20_000), ("ff5a36", 4_000), (paper, 100_000)):
        pixel = bytes.fromhex(colour)
        count = sum(row.count(pixel) for row in rows)
        assert count > least, (colour, count)
