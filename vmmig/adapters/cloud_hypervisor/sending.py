"""The source of a migration to Cloud Hypervisor: gives it a whole VM."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress

from vmmig import sockets
from vmmig._native import runs
from vmmig.adapters.cloud_hypervisor.ram import RamFiles, check_covered, ram_mappings
from vmmig.adapters.cloud_hypervisor.receiving import cause_of, url_of
from vmmig.codec import read_pieces
from vmmig.errors import MigratableError, MigrateSendError, MissingExtraError
from vmmig.formats.cloud_hypervisor import CONFIG, MEMORY, to_parts
from vmmig.live import MigrationInDoubt
from vmmig.live.link import Link, PeerError
from vmmig.live.payloads import RamMapping
from vmmig.memory import MemoryRange, MemoryRangeTable
from vmmig.protocol import (
    Abandon,
    Complete,
    CompletePaused,
    Config,
    Connection,
    MemoryFd,
    Message,
    PageFault,
    Role,
    Start,
    State,
)
from vmmig.snapshot import Snapshot, raw_view
from vmmig.transfer import CancelToken, Progress, Transfer

_RAM = re.compile("0x[0-9a-f]{1,16}")
_ABANDON_S = 5.0
_PAGE_FAULT_S = 1.0


def send_vm(
    snapshot: Snapshot,
    socket_path: str | os.PathLike[str],
    *,
    resume: bool,
    hand_over: bool = True,
    forget: bool = False,
    progress: Callable[[Progress], object] | None = None,
    cancel: CancelToken | None = None,
    timeout_s: float = 60.0,
) -> int:
    """Be the source of one migration; returns how much RAM the VM has.

    Args:
        snapshot: As `vmmig.formats.cloud_hypervisor` has it, with the Config of a migration.
        socket_path: Where Cloud Hypervisor listens.
        forget: The snapshot is not needed any more: let go of each piece of RAM once it is sent.
        resume: As for `offload_restore`; so are the others.

    Raises:
        MigrateSendError: See `offload_restore`.
        MigrationInDoubt: See `offload_restore`.

    >>> send_vm(Snapshot("vm"), "/no/such/socket", resume=False)
    Traceback (most recent call last):
    vmmig.errors.MigrateSendError: ...
    """
    sender = _Sender(
        snapshot,
        url_of(socket_path),
        resume=resume,
        forget=forget,
        progress=progress,
        cancel=cancel or CancelToken(),
        timeout_s=timeout_s,
    )
    return sender.run(hand_over)


class _Sender:
    def __init__(
        self,
        snapshot: Snapshot,
        url: str,
        *,
        resume: bool,
        forget: bool,
        progress: Callable[[Progress], object] | None,
        cancel: CancelToken,
        timeout_s: float,
    ) -> None:
        self.snapshot = snapshot
        self.url = url
        self.resume = resume
        self.forget = forget
        self.cancel = cancel
        self.timeout_s = timeout_s
        self.transfer = Transfer(url, MigrateSendError, progress=progress, cancel=cancel)

    def run(self, hand_over: bool) -> int:
        try:
            self._open()
            if hand_over:
                with RamFiles(self.mappings) as files:
                    self.transfer.enter("transferring")
                    self._fill(files)
                    self._migrate(files.descriptors)
            else:
                self._migrate({})
        except (MigrationInDoubt, MissingExtraError):
            raise
        except Exception as error:
            if isinstance(error, MigrateSendError) and str(error.cause).startswith(repr(self.url)):
                raise
            raise self.transfer.failure(cause_of(error)) from error
        self.transfer.finish()
        return self.transfer.total_bytes or 0

    def _open(self) -> None:
        """Look at all of the snapshot but the RAM's bytes."""
        self.transfer.enter("connecting")
        root = self.snapshot
        memory = root.snapshots.get(MEMORY, Snapshot(MEMORY))
        ram = {id: each for id, each in memory.snapshot_data.items() if _RAM.fullmatch(id)}
        # The rest of what is called so is of the state's tree.
        other = {id: each for id, each in memory.snapshot_data.items() if id not in ram}
        children = {id: each for id, each in root.snapshots.items() if id != MEMORY}
        if other or memory.snapshots:
            children[MEMORY] = Snapshot(MEMORY, memory.snapshots, other)
        parts = to_parts(Snapshot(root.id, children, root.snapshot_data))
        self.config, self.state = parts.config, parts.state
        self.mappings = self._mappings()
        self.sections = sorted(
            ((MemoryRange(int(id, 16), each.nbytes), each) for id, each in ram.items()),
            key=lambda pair: pair[0],
        )
        check_covered(self.mappings, (where for where, _ in self.sections))
        self.transfer.total_bytes = sum(each.range.length for each in self.mappings)
        if self.forget:
            memory.snapshot_data.clear()

    def _mappings(self) -> tuple[RamMapping, ...]:
        try:
            return ram_mappings(self.config)
        except MigratableError as error:
            raise MigrateSendError(
                f"the snapshot has no Config of a migration ({error.cause}), as one that "
                "`vmmig offload snapshot` stored has; give what vm.snapshot wrote to vm.restore"
            ) from error

    def _fill(self, files: RamFiles) -> None:
        """Put the RAM where it goes, without holding it a second time."""
        for where, section in self.sections:
            gpa = where.gpa
            for piece in read_pieces(section):
                files.write(gpa, piece, self.transfer.advance)
                gpa += len(piece)

    def _migrate(self, descriptors: dict[int, int]) -> None:
        sock = sockets.connect(self.url, timeout_s=self.timeout_s, cancel=self.cancel)
        link = Link(sock, Connection(Role.SENDER))
        try:
            with self.cancel.calling(link.shut_down):
                self._prepare(link, descriptors)
                self.transfer.enter("confirming")
            self.transfer.check()
            self._hand_over(link)
        except BaseException:
            if link.connection.request is None:
                with suppress(MigratableError, OSError):
                    sockets.set_timeout(sock, min(self.timeout_s, _ABANDON_S))
                    link.ask(Abandon())
            raise
        finally:
            link.close()

    def _prepare(self, link: Link, descriptors: dict[int, int]) -> None:
        # No addition is announced: what Start's header has there is Cloud Hypervisor's to define.
        _ask(link, Start())
        for slot, fd in descriptors.items():
            _ask(link, MemoryFd(slot), fd)
        _ask(link, Config(self.config))
        if not descriptors:
            self._send_memory(link)
        _ask(link, State(self.state))

    def _send_memory(self, link: Link) -> None:
        self.transfer.enter("transferring")
        while self.sections:
            where, section = self.sections.pop(0)
            gpa, view = where.gpa, raw_view(section.snapshot)
            spans = [(start, end) for start, end, is_zero in runs(view) if not is_zero]
            self.transfer.advance(len(view) - sum(end - start for start, end in spans))
            if not spans:
                continue
            table = MemoryRangeTable.from_spans(
                [gpa + start for start, _ in spans], [gpa + end for _, end in spans]
            )
            views = [view[start:end] for start, end in spans]
            link.send_memory(table, views, self.transfer.advance)

    def _hand_over(self, link: Link) -> None:
        """Send the last message; from here on only its answer counts."""
        try:
            _ask(link, Complete() if self.resume else CompletePaused())
        except MigrateSendError:
            raise
        except (MigratableError, OSError) as error:
            raise MigrationInDoubt(
                f"{self.url!r}: the answer to the last message is lost ({error}): look whether "
                "Cloud Hypervisor has the VM before you restore it again"
            ) from error
        sockets.set_timeout(link.sock, min(self.timeout_s, _PAGE_FAULT_S))
        try:
            event = link.event()
        except (MigratableError, OSError):
            return
        if isinstance(event, PageFault):
            refusal = MigrateSendError(
                "Cloud Hypervisor asks for single pages, but all RAM was handed over: let it "
                "receive the migration without post-copy"
            )
            link.refuse(refusal)
            raise refusal


def _ask(link: Link, request: Message, fd: int | None = None) -> None:
    try:
        link.ask(request, fd)
    except PeerError as error:
        raise MigrateSendError(
            f"Cloud Hypervisor refused {type(request).__name__} ({error}); its log says why"
        ) from error


def is_of_migration(snapshot: Snapshot) -> bool:
    """Whether a snapshot has the Config of a migration, not only a VM's configuration.

    >>> is_of_migration(Snapshot("vm"))
    False
    """
    section = snapshot.snapshot_data.get(CONFIG)
    try:
        return section is not None and bool(ram_mappings(bytes(section.snapshot)))
    except MigratableError:
        return False
