"""The file transport and the table of schemes, on real files."""

from __future__ import annotations

import array
import errno
import gc
import json
import mmap
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import vmmig
from vmmig import transport
from vmmig.errors import (
    DecodeError,
    MigratableError,
    MigrateReceiveError,
    MigrateSendError,
    SnapshotError,
)
from vmmig.transport import file

MIB = 1 << 20
NOBODY = 65534


def save(data: bytes, url: Any) -> None:
    transport.send([data], url, total_bytes=len(data))


def in_child(act: Callable[[], object], *, as_nobody: bool = False) -> Any:
    """What ``act`` returns or raises in a forked process, which has 60 s."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(60)
            if as_nobody and os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            try:
                result = act()
            except BaseException as error:
                result = error
            os.write(write_end, pickle.dumps(result))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    assert answer, "the child was killed before it could answer"
    return pickle.loads(answer)


@pytest.fixture
def open_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, which also nobody may enter, read and write."""
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


# What is saved comes back


names = (
    st.binary(min_size=1, max_size=255)
    .filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))
    .map(os.fsdecode)
)
chunks = st.lists(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=300).map(bytearray),
        st.binary(max_size=300).map(memoryview),
        st.lists(st.integers(0, 2**32 - 1)).map(partial(array.array, "I")),
    ),
    max_size=20,
)


@given(name=names, chunks=chunks)
@example(name="x" * 255, chunks=[b"the longest name"])
@example(name="%41?#\udcff\n", chunks=[])
def test_any_name_and_any_chunks_come_back(shared: Path, name: str, chunks: list[Any]) -> None:
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        path = Path(folder, name)
        whole = b"".join(map(bytes, chunks))
        transport.send(iter(chunks), path, total_bytes=len(whole))
        assert os.listdir(folder) == [name]
        assert path.read_bytes() == whole
        for url in (path, str(path), path.as_uri(), f"FILE://LocalHost{quote(bytes(path))}"):
            view = transport.recv(url)
            assert view.readonly
            assert view == whole


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([8 * MIB], id="one-full-write"),
        pytest.param([8 * MIB - 1, 2, 8 * MIB, 1], id="across-writes"),
        pytest.param([0, 20 * MIB + 1, 0], id="one-large-chunk"),
        pytest.param([3] * 5000, id="many-small-chunks"),
        pytest.param([8 * MIB + 5, *[7] * 1023, *[0] * 2000, 1], id="mixed"),
    ],
)
def test_chunks_larger_and_more_than_one_write_takes(tmp_path: Path, sizes: list[int]) -> None:
    whole = memoryview(os.urandom(sum(sizes)))
    pieces = []
    start = 0
    for size in sizes:
        pieces.append(whole[start : start + size])
        start += size
    transport.send(pieces, tmp_path / "vm", total_bytes=len(whole))
    assert transport.recv(tmp_path / "vm") == whole


def test_writes_that_take_only_a_part_are_continued() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    came = bytearray()
    reads = 0

    def drain(*_: object) -> None:
        nonlocal reads
        try:
            came.extend(os.read(read_end, 50_000))
            reads += 1
        except BlockingIOError:
            pass

    # The pipe is full until a signal interrupts the write, and its handler reads some of it.
    before = signal.signal(signal.SIGALRM, drain)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        parts = [os.urandom(size) for size in (1, 70_000, 3, 0, 300_000, *[11] * 3000)]
        assert file.write_chunks(write_end, parts) == sum(map(len, parts))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.close(write_end)
    with open(read_end, "rb", buffering=0) as pipe:
        came += pipe.readall()
    assert came == b"".join(parts)
    assert reads > 1


def test_an_empty_file(tmp_path: Path) -> None:
    transport.send([], tmp_path / "vm", total_bytes=0)
    view = transport.recv(tmp_path / "vm")
    assert (view.nbytes, view.readonly) == (0, True)


def test_received_bytes_are_a_mapping_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vm"
    with open(path, "wb") as hole:
        hole.truncate(1 << 36)
        os.pwrite(hole.fileno(), b"end", (1 << 36) - 3)
    view = transport.recv(path)
    assert isinstance(view.obj, mmap.mmap)
    assert view.nbytes == 1 << 36
    assert view[-3:] == b"end"


def test_a_view_outlives_the_file_that_is_replaced_and_deleted(tmp_path: Path) -> None:
    path = tmp_path / "vm"
    old = os.urandom(100_000)
    save(old, path)
    view = transport.recv(path)
    transport.send([b"new: ", view], path, total_bytes=5 + len(old))
    assert view == old
    assert path.read_bytes() == b"new: " + old
    path.unlink()
    assert view == old


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = fds()
    save(b"x", tmp_path / "vm")
    with pytest.raises(MigrateSendError):
        transport.send([b"x"], tmp_path / "vm", total_bytes=2)
    with pytest.raises(MigrateReceiveError):
        transport.recv(tmp_path)
    del_me = transport.recv(tmp_path / "vm")
    del del_me
    assert fds() == before


# What the file is like


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_the_mode_is_0600_whatever_it_was_and_the_umask_is(tmp_path: Path, umask: int) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")
    old.chmod(0o666)
    before = os.umask(umask)
    try:
        save(b"x", old)
        save(b"x", tmp_path / "new")
    finally:
        os.umask(before)
    assert {old.stat().st_mode & 0o7777, (tmp_path / "new").stat().st_mode & 0o7777} == {0o600}


def test_it_is_private_while_it_is_written_and_has_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "vm"
    path.write_bytes(b"old")
    seen = []

    def parts() -> Iterator[bytes]:
        (part,) = [entry for entry in os.scandir(tmp_path) if entry.name != "vm"]
        seen.append((part.name, part.stat().st_mode & 0o7777, path.read_bytes()))
        yield b"new"

    transport.send(parts(), path, total_bytes=3)
    ((name, mode, content),) = seen
    assert name.startswith(".vmmig-")
    assert name.endswith(".part")
    assert (mode, content) == (0o600, b"old")
    assert os.listdir(tmp_path) == ["vm"]


def test_a_symbolic_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target = tmp_path / "a/vm"
    target.write_bytes(b"old")
    for link, to in (("b/link", "../a/vm"), ("b/link2", "link"), ("dangling", "a/fresh")):
        (tmp_path / link).symlink_to(to)
        save(link.encode(), tmp_path / link)
        assert (tmp_path / link).is_symlink()
        assert (tmp_path / link).read_bytes() == link.encode()
        assert transport.recv(tmp_path / link) == link.encode()
    assert target.read_bytes() == b"b/link2"
    assert sorted(os.listdir(tmp_path / "a")) == ["fresh", "vm"]


def test_a_hard_link_keeps_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")
    os.link(tmp_path / "kept", tmp_path / "vm")
    save(b"new", tmp_path / "vm")
    assert (tmp_path / "kept").read_bytes() == b"old"


# What cannot be saved leaves everything as it was


def refused_send(url: Any, data: bytes = b"new") -> str:
    with pytest.raises(MigrateSendError) as caught:
        save(data, url)
    return str(caught.value)


def refused_recv(url: Any) -> str:
    with pytest.raises(MigrateReceiveError) as caught:
        transport.recv(url)
    return str(caught.value)


def test_a_missing_folder(tmp_path: Path) -> None:
    path = tmp_path / "none" / "vm"
    message = refused_send(path)
    assert repr(str(path)) in message
    assert "No such file or directory; check the path, and that its folder exists" in message
    assert "No such file" in refused_recv(path)


@pytest.mark.parametrize("name", ["", "/", "/.", "/..", "/none/", "/none/.", "/none/.."])
def test_a_folder_is_no_file(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    message = refused_send(f"{folder}{name}")
    assert "Is a directory; name a file" in message or "No such file" in message
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(folder) == []
    assert "Is a directory; name a file" in refused_recv(folder)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for path in (tmp_path / "file" / "vm", f"{tmp_path}/file/"):
        assert "a part of the path is a file" in refused_send(path)
        assert "a part of the path is a file" in refused_recv(path)


def test_links_that_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "vm").symlink_to("vm")
    assert "symbolic links" in refused_send(tmp_path / "vm")
    assert "symbolic links" in refused_recv(tmp_path / "vm")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 256), tmp_path / ("x/" * 4096)):
        assert "use a shorter name" in refused_send(path)
        assert "use a shorter name" in refused_recv(path)


def test_a_pipe_a_socket_and_a_device_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/null")):
            for act, kind in (
                (partial(save, b"new", path), MigrateSendError),
                (partial(transport.recv, path), MigrateReceiveError),
            ):
                error = in_child(act)
                assert type(error) is kind
                assert "a device, a pipe or a socket; name a regular file" in str(error)
    assert sorted(os.listdir(tmp_path)) == ["pipe", "socket"]


def test_no_permission_on_the_folder(open_folder: Path) -> None:
    Path("vm").write_bytes(b"old")
    Path("vm").chmod(0o666)
    for mode in (0o555, 0o333, 0o000):
        open_folder.chmod(mode)
        error = in_child(partial(save, b"new", "vm"), as_nobody=True)
        open_folder.chmod(0o777)
        assert type(error) is MigrateSendError
        assert "Permission denied; change the permissions" in str(error)
        assert Path("vm").read_bytes() == b"old"
        assert os.listdir() == ["vm"]


def test_no_permission_on_the_file(open_folder: Path) -> None:
    Path("vm").write_bytes(b"old")
    Path("vm").chmod(0o444)
    error = in_child(partial(save, b"new", "vm"), as_nobody=True)
    assert type(error) is MigrateSendError
    assert "'vm': it is write-protected; make it writable" in str(error)
    assert Path("vm").read_bytes() == b"old"
    assert os.listdir() == ["vm"]

    Path("vm").chmod(0o000)
    error = in_child(partial(transport.recv, "vm"), as_nobody=True)
    assert type(error) is MigrateReceiveError
    assert "Permission denied; change the permissions" in str(error)


def test_a_part_file_that_cannot_be_removed_is_named(open_folder: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"n"
        os.chmod(".", 0o555)
        yield b"ew"

    def act() -> tuple[str, list[str]]:
        os.mkdir("mine")
        os.chdir("mine")
        with pytest.raises(MigrateSendError) as caught:
            transport.send(parts(), "vm", total_bytes=3)
        return str(caught.value), os.listdir()

    message, (left,) = in_child(act, as_nobody=True)
    assert f"{left!r} is left in the folder (Permission denied); delete it" in message


def test_the_limit_on_file_sizes(tmp_path: Path) -> None:
    path = tmp_path / "vm"
    path.write_bytes(b"old")

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(bytes(MIB), path)

    error = in_child(act)
    assert type(error) is MigrateSendError
    assert "File too large; raise the limit on file sizes (ulimit -f)" in str(error)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vm"]


SMALL_DISK = """
import json, os, subprocess, sys
from vmmig.errors import MigrateSendError
from vmmig.transport import send
os.chdir(sys.argv[1])
send([b"old"], "vm", total_bytes=3)

def save(name, size):
    try:
        send([b"x" * size], name, total_bytes=size)
        answer = "saved"
    except MigrateSendError as error:
        answer = str(error)
    return answer, os.listdir(), open("vm", "rb").read().decode()

answers = [save("vm", 2 << 20), save("new", 2 << 20)]
os.chdir("/")
subprocess.run(["mount", "-o", "remount,bind,ro", sys.argv[1]], check=True)
os.chdir(sys.argv[1])
answers += [save("vm", 1), save("new", 1)]
print(json.dumps(answers))
"""


def test_a_full_and_a_read_only_file_system(tmp_path: Path) -> None:
    """On a tmpfs of 1 MiB, in a mount namespace of its own."""
    private = ["unshare", "--mount"]
    if os.geteuid() != 0:
        private += ["--user", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=1m vmmig "$0"'
    try:
        probe = subprocess.run([*private, "sh", "-c", mount, tmp_path], capture_output=True)
        refusal = probe.stderr.decode() if probe.returncode else ""
    except FileNotFoundError as error:
        refusal = str(error)
    if refusal and not os.environ.get("CI"):
        pytest.skip(f"may not mount a tmpfs: {refusal}")
    assert not refusal

    python = [sys.executable, "-c", SMALL_DISK, tmp_path]
    done = subprocess.run(
        [*private, "sh", "-c", f'{mount} && exec "$@"', tmp_path, *python],
        env={**os.environ, "PYTHONPATH": str(Path(vmmig.__file__).parents[1])},
        stdout=subprocess.PIPE,
        check=True,
    )
    full_old, full_new, protected, read_only = json.loads(done.stdout)
    for answer, there, content in (full_old, full_new, protected, read_only):
        assert answer.startswith("Failed to send")
        assert (there, content) == (["vm"], "old")
    for message in (full_old[0], full_new[0]):
        assert "No space left on device; free some space there, or save elsewhere" in message
    assert "'vm': it is write-protected; make it writable, or save elsewhere" in protected[0]
    assert "Read-only file system; save elsewhere, or remount it for writing" in read_only[0]


@pytest.mark.parametrize("total_bytes", [0, 2, 4, 1 << 70, -1])
def test_chunks_that_are_not_as_many_bytes_as_announced(tmp_path: Path, total_bytes: int) -> None:
    (tmp_path / "vm").write_bytes(b"old")
    with pytest.raises(MigrateSendError, match=f"3 bytes came where {total_bytes} were announced"):
        transport.send([b"abc"], tmp_path / "vm", total_bytes=total_bytes)
    assert (tmp_path / "vm").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vm"]


def test_chunks_beyond_those_announced_are_not_asked_for(tmp_path: Path) -> None:
    parts = iter([b"x"] * 100)
    with pytest.raises(MigrateSendError, match="announced"):
        transport.send(parts, tmp_path / "vm", total_bytes=5)
    assert len(list(parts)) == 94
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "caught", "message"),
    [
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (SystemExit(3), SystemExit, "3"),
        (SnapshotError("gone"), SnapshotError, "gone"),
        (ValueError("odd"), MigrateSendError, r"the bytes to send cannot be had: ValueError\('odd"),
        (OSError(errno.ENOENT, "no"), MigrateSendError, "the bytes to send cannot be had: FileNot"),
    ],
)
def test_chunks_that_raise(
    tmp_path: Path, raised: BaseException, caught: type[BaseException], message: str
) -> None:
    def parts() -> Iterator[bytes]:
        yield b"new" * MIB
        raise raised

    (tmp_path / "vm").write_bytes(b"old")
    with pytest.raises(caught, match=message):
        transport.send(parts(), tmp_path / "vm", total_bytes=4 * MIB)
    assert (tmp_path / "vm").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["vm"]


@pytest.mark.parametrize("chunk", [memoryview(b"abcd")[::2], "text", 5, None])
def test_chunks_that_are_no_contiguous_bytes(tmp_path: Path, chunk: Any) -> None:
    with pytest.raises(MigrateSendError, match="the bytes to send cannot be had"):
        transport.send([chunk], tmp_path / "vm", total_bytes=2)
    assert os.listdir(tmp_path) == []


def test_views_in_a_failed_save_survive_the_garbage_collector(tmp_path: Path) -> None:
    """Some versions of Python crash on a view of a view in a cycle, as tracebacks make them."""

    def act() -> str:
        gc.disable()
        for total_bytes in (1, 3, 5):
            try:
                transport.send([memoryview(b"abc"), b"d"], tmp_path / "vm", total_bytes=total_bytes)
            except MigrateSendError as error:
                error.args = (error,)
        gc.collect()
        return "survived"

    assert in_child(act) == "survived"


# Names of files


@given(path=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
@example(path="//")
def test_a_url_means_the_path_that_was_quoted(path: str) -> None:
    if not path.startswith("//"):
        assert file.path_of(f"file:{quote(path)}") == path
    assert file.path_of(f"file:///{quote(path)}") == f"/{path}"
    assert file.path_of(f"file://localhost/{quote(path)}") == f"/{path}"
    assert file.path_of(f"FILE:/{quote(path, safe='')}") == f"/{path}"
    assert file.path_of(Path(path)) == str(Path(path))


@given(url=st.text() | st.text("file:/%aA0?#l.\0\udc80\ud800", max_size=20).map("file:".__add__))
@example(url="file:%41")
def test_any_text_is_a_path_or_a_clear_error(url: str) -> None:
    try:
        path = file.path_of(url, MigrateReceiveError)
    except MigrateReceiveError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert message.isprintable()
        return
    assert path
    assert b"\0" not in os.fsencode(path)
    if not url.lower().startswith("file:"):
        assert path == url
    elif "%" not in url:
        assert url.endswith(path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "the path is empty"),
        ("file:", "the path is empty"),
        ("file://", "the path is empty"),
        ("file://localhost", "the path is empty"),
        ("a\0b", "NUL"),
        ("file:///a%00b", "NUL"),
        ("\ud800", "such characters"),
        ("file:///\ud800", "such characters"),
        ("file:///100%", "write %25 for %"),
        ("file:///%4x", "write %25 for %"),
        ("file:///%+4", "write %25 for %"),
        ("file:///vm?compress=1", "no query or fragment"),
        ("file:///vm#cpu", "no query or fragment"),
        ("file://vm.vmsnap", "another host ('vm.vmsnap')"),
        ("file://server/vm", "three slashes"),
        ("pigeon:host:1", "no transport for 'pigeon:', only for "),
        ("Pigeon:host:1", "a file of this name is './Pigeon:host:1'"),
        ("a:b", "'./a:b'"),
        ("C:x", "'./C:x'"),
        ("backup-12:30", "'./backup-12:30'"),
        (None, "a URL or a path is needed, not NoneType"),
        (3, "a URL or a path is needed, not int"),
    ],
)
def test_what_names_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused_send(url)
    assert message in refused_recv(url)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("./tcp:x", "tcp:x"),
        (Path("tcp:x"), "tcp:x"),
        (Path("file:x"), "file:x"),
        ("12:30", "12:30"),
        ("_a:b", "_a:b"),
        (":x", ":x"),
        ("file:tcp:x", "tcp:x"),
        ("file:a%20b", "a b"),
        ("a%20b", "a%20b"),
        ("file", "file"),
        ("äöü:x", "äöü:x"),
        ("sub/../a b?c#d", "a b?c#d"),
    ],
)
def test_what_names_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: Any, name: str
) -> None:
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    save(b"x", url)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "sub"])
    assert transport.recv(url) == b"x"


def test_a_path_like_of_bytes(tmp_path: Path) -> None:
    class Bytes:
        def __fspath__(self) -> bytes:
            return bytes(tmp_path / "vm\udcff")

    save(b"x", Bytes())
    assert os.listdir(bytes(tmp_path)) == [b"vm\xff"]


def test_errors_pickle(tmp_path: Path) -> None:
    with pytest.raises(MigratableError) as caught:
        save(b"x", tmp_path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (MigrateSendError, str(caught.value))


def test_a_transport_is_loaded_when_it_is_used() -> None:
    code = (
        "import sys, vmmig.transport as t; "
        "assert 'vmmig.transport.file' not in sys.modules; "
        "t.recv('/proc/self/status'); assert 'vmmig.transport.file' in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(vmmig.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vm.vmsnap"
    vmmig.send(vmmig.Snapshot("vm"), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MigrateReceiveError, match=r"vm\.vmsnap': .*truncated: 1 of") as caught:
        vmmig.recv(path)
    assert isinstance(caught.value.__cause__, DecodeError)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([0, 1, 65]), st.integers(0, 3 << 16)), max_size=8))
def test_runs_of_zeros_become_holes_and_are_still_zeros(parts: list[tuple[int, int]]) -> None:
    chunks = [bytes([value]) * size for value, size in parts]
    chunks.append(b"".join(chunks))
    whole = b"".join(chunks)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vm"
        transport.send(chunks, path, total_bytes=len(whole))
        assert bytes(transport.recv(path)) == whole
        if len(whole) >= 1 << 18 and not any(whole):
            assert os.stat(path).st_blocks * 512 < len(whole)


def test_a_file_of_zeros_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "vm"
    transport.send([b"a", bytes(8 * MIB), b"b", bytes(8 * MIB)], path, total_bytes=16 * MIB + 2)
    assert path.stat().st_size == 16 * MIB + 2
    assert path.stat().st_blocks * 512 <= 1 << 16
    assert path.read_bytes() == b"a" + bytes(8 * MIB) + b"b" + bytes(8 * MIB)
