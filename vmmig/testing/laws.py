"""The laws of a component, each with a check that tries to break it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import SkipTest

import attrs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmmig.codec import dumps, loads
from vmmig.errors import ContractError
from vmmig.snapshot import Snapshot, SnapshotDataSection, raw_view
from vmmig.testing.attempts import (
    Actor,
    Attempt,
    Call,
    Subject,
    is_transportable,
    let_threads_run,
    standing_time,
    watched,
)
from vmmig.traits import Snapshottable, Transportable
from vmmig.verify import verify

_HOUR_S = 4096  # A power of two, so that no float is rounded.
_NOT_THE_COMPONENTS_FAULT = [
    HealthCheck.data_too_large,
    HealthCheck.filter_too_much,
    HealthCheck.large_base_example,
    HealthCheck.too_slow,
]
_UNKNOWN = "vmmig-unknown"


@attrs.frozen
class Law:
    """One law: its name, and a check that tries to break it."""

    name: str
    check: Callable[..., None]
    effort: float
    applies: Callable[[Subject], bool]

    @property
    def test_name(self) -> str:
        return "test_" + self.name.replace(" ", "_").replace(",", "").replace("-", "_")


LAWS: list[Law] = []


def _law(
    name: str, *, effort: float = 0.5, applies: Callable[[Subject], bool] = lambda _: True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(check: Callable[..., None]) -> Callable[..., None]:
        LAWS.append(Law(name, check, effort, applies))
        return check

    return register


def scaled_settings(effort: float, **more: Any) -> settings:
    return settings(
        max_examples=max(1, round(settings().max_examples * effort)),
        deadline=None,
        suppress_health_check=_NOT_THE_COMPONENTS_FAULT,
        **more,
    )


def as_test(law: Law, subject: Subject) -> Callable[..., None]:
    @scaled_settings(law.effort)
    @given(other=subject.plans, later=subject.plans, first=subject.plans, data=st.data())
    def test(
        self: Any, first: list[Call], later: list[Call], other: list[Call], data: st.DataObject
    ) -> None:
        law.check(Attempt(subject, law.name), first, later, other, data)

    test.__name__ = law.test_name
    test.__qualname__ = f"Test{subject.name}.{law.test_name}"
    test.__doc__ = f"{law.name[0].upper()}{law.name[1:]}."
    test.vmmig_law = law.name  # type: ignore[attr-defined]
    return test


@_law("structure", effort=0.01)
def _structure(run: Attempt, *_: Any) -> None:
    subject = run.subject
    one, two = run.new("one"), run.new("two")
    if one.component is two.component:
        run.fail("the factory gave the same object twice; it must make a new one each time")
    protocols: list[type] = [Snapshottable]
    if is_transportable(one.component):
        protocols.append(Transportable)
    for protocol in protocols:
        try:
            verify(one.component, protocol, defaults="error")
        except ContractError as error:
            run.fail(str(error))
    ids = [one.component.id(), one.component.id(), two.component.id()]
    one.write("one.id(), one.id(), two.id()")
    if not isinstance(ids[0], str):
        run.fail(f"id() gave {ids[0]!r}, which is not a str")
    if len({*ids}) > 1:
        run.fail(f"id() is not always the same: {', '.join(map(repr, ids))}")
    one.pause()
    snapshot = one.snapshot()
    if snapshot.id != ids[0]:
        run.fail(f"snapshot() has the id {snapshot.id!r}, but id() is {ids[0]!r}")
    if subject.observe is not None:
        one.look()


@_law("a snapshot changes nothing")
def _snapshot_changes_nothing(run: Attempt, first: list[Call], *_: Any) -> None:
    one = run.paused("component", first)
    before = one.look()
    with watched(one.component, "resume") as resumed:
        one.snapshot()
    if resumed:
        run.fail("snapshot() resumed the component, which was paused")
    run.same(before, one.look(), "snapshot() changed what is observed")


@_law("equal states give equal bytes")
def _equal_bytes(run: Attempt, first: list[Call], *_: Any) -> None:
    one = run.paused("component", first)
    saved = dumps(one.snapshot())
    again = dumps(one.snapshot("again"))
    run.same_bytes(saved, again, "two snapshots of the same state differ")


@_law("a snapshot is a value", effort=0.6)
def _snapshot_is_a_value(
    run: Attempt, first: list[Call], later: list[Call], other: list[Call], *_: Any
) -> None:
    one = run.paused("component", first)
    saved = one.snapshot()
    data = dumps(saved)
    one.resume()
    one.do_all(later)
    one.pause()
    one.snapshot("later")
    run.same_bytes(data, dumps(saved), "the snapshot changed when the component went on")
    before = one.look()
    saved = one.snapshot("saved")
    _scribble(one, saved)
    run.same(before, one.look(), "the component changed when its snapshot was changed")
    given = _copied(loads(data), one.snapshot("kind"))
    data = dumps(given)
    two = run.new("second")
    two.pause()
    two.restore(given, "copy_of_first")
    run.same_bytes(data, dumps(given), "restore() changed the snapshot it was given")
    before = two.look()
    _scribble(two, given, "copy_of_first")
    run.same(before, two.look(), "the component changed when the snapshot it was restored from was")
    given = loads(data)
    given = _copied(given, one.snapshot("kind"))
    two.restore(given, "copy_of_first")
    two.resume()
    two.do_all(other)
    two.pause()
    run.same_bytes(
        data, dumps(given), "the snapshot that was restored changed when the component went on"
    )


@_law("restore gives the same state", effort=1.5)
def _restore_gives_the_same(
    run: Attempt, first: list[Call], later: list[Call], other: list[Call], *_: Any
) -> None:
    one = run.paused("component", first)
    saved = one.snapshot()
    seen = one.look()
    for kind in ("fresh", "used"):
        two = run.new(kind)
        if kind == "used":
            two.resume()
            two.do_all(other)
        two.pause()
        if kind == "used":
            two.look()
            two.snapshot("_")
        with watched(two.component, "resume") as resumed:
            two.restore(saved)
        if resumed:
            run.fail("restore() resumed the component, which was paused")
        run.same(seen, two.look(), f"a {kind} component is not what was saved")
        run.same_snapshots(
            saved, two.snapshot("again"), f"a {kind} component's snapshot is not what it restored"
        )
    run.same(seen, one.look(), "the component changed when another was restored from its snapshot")
    if not run.subject.runs_by_itself:
        one.resume()
        one.do_all(later)
        one.pause()
        one.restore(saved)
        run.same(seen, one.look(), "the component did not go back to what was saved")


@_law("a restored component behaves like the one that was saved", effort=1.5)
def _differential(
    run: Attempt, first: list[Call], later: list[Call], other: list[Call], *_: Any
) -> None:
    with standing_time() as pass_time:
        one = run.paused("component", first)
        saved = one.snapshot()
        fresh, used = run.new("fresh"), run.started("used")
        used.do_all(other)
        for two in (fresh, used):
            two.pause()
            two.restore(saved)
        for actor in (one, fresh, used):
            actor.resume()
        for call in later:
            pass_time(1)
            expected = one.do(call)
            for two in (fresh, used):
                run.same(expected, two.do(call), f"the {two.name} component behaves in another way")
        for actor in (one, fresh, used):
            actor.pause()
        if not run.subject.runs_by_itself:
            for two in (fresh, used):
                run.same(one.look(), two.look(), f"the {two.name} component came to another state")


@_law("pausing and resuming is safe, also repeated", effort=0.8)
def _pause_and_resume(
    run: Attempt, first: list[Call], later: list[Call], _: list[Call], data: st.DataObject
) -> None:
    rounds = st.lists(st.sampled_from(["pause", "resume"]), max_size=5)
    with standing_time():
        one, twin = run.new("component"), run.new("twin")
        alike = one.subject_is_deterministic(twin)
        for call in first:
            for action in data.draw(rounds):
                one.must(action)
            one.resume()
            outcome, expected = one.do(call), twin.do(call)
            if alike:
                run.same(expected, outcome, "a call after a pause has another outcome")
        one.pause()
        before = one.look()
        let_threads_run()
        run.same(before, one.look(), "the component changed while it was paused")
        for action in data.draw(rounds):
            one.must(action)
            if action == "pause" and not run.subject.runs_by_itself:
                run.same(before, one.look(), "pausing and resuming changed the state")
        one.pause()
        if not run.subject.runs_by_itself:
            run.same(before, one.look(), "pausing and resuming changed the state")
            if alike:
                twin.pause()
                run.same(twin.look(), one.look(), "it is not where one without pauses is")
        one.resume()
        for call in later:
            outcome = one.do(call)
            if alike and run.subject.runs_by_itself:
                run.same(twin.do(call), outcome, "a call after a pause has another outcome")


@_law("time that passes while it is paused does not show", effort=0.3)
def _time(run: Attempt, first: list[Call], later: list[Call], *_: Any) -> None:
    with standing_time() as pass_time:
        one, still = run.started("component"), run.started("without_the_hour")
        alike = one.subject_is_deterministic(still)
        for actor in (one, still):
            actor.do_all(first)
            actor.pause()
        still.resume()
        expected = [still.do(call) for call in later]
        saved = one.snapshot()
        before = one.look()
        pass_time(_HOUR_S)
        one.write("# an hour passes")
        run.same(before, one.look(), "the paused component noticed that time passed")
        two = run.new("restored")
        two.pause()
        two.restore(saved)
        run.same(before, two.look(), "a component restored an hour later is not what was saved")
        for actor in (one, two):
            actor.resume()
            if not run.subject.runs_by_itself:
                actor.pause()
                run.same(before, actor.look(), "the hour of the pause shows after resume()")
                actor.resume()
            if alike:
                outcomes = [actor.do(call) for call in later]
                run.same(expected, outcomes, "the hour of the pause shows in what it does later")


@_law("a foreign, truncated or altered snapshot is refused or taken whole", effort=1.2)
def _damaged(
    run: Attempt, first: list[Call], _: list[Call], other: list[Call], data: st.DataObject
) -> None:
    one = run.paused("component", first)
    saved = one.snapshot()
    if not saved.snapshots and not saved.snapshot_data:
        return
    seen = one.look()
    used, fresh = run.started("used"), run.new("fresh")
    used.do_all(other)
    for two in (used, fresh):
        two.pause()
    for how, damaged, must_refuse in data.draw(st.lists(_damages(saved), min_size=1, max_size=5)):
        accepted = [_takes(two, damaged, how) for two in (used, fresh)]
        if any(accepted) and must_refuse:
            run.fail(f"restore() accepted a snapshot that cannot be its own: {how}")
        if accepted[0] != accepted[1]:
            run.fail(f"whether restore() accepts a snapshot ({how}) depends on what was before")
        if all(accepted):
            what = f"restore() accepted a snapshot ({how}), but took over only a part of it"
            run.same(fresh.look(), used.look(), what)
            run.same_snapshots(fresh.snapshot("_"), used.snapshot("_"), what)
            used.restore(saved)
            run.same(seen, used.look(), f"after a damaged snapshot ({how}), a sound one fails")
            used.resume()
            used.do_all(other)
            used.pause()


def _takes(actor: Actor, damaged: Snapshot, how: str) -> bool:
    """Whether it accepts a damaged snapshot; one that refuses it must be as it was."""
    before, snapshot = actor.look(), dumps(actor.snapshot("_"))
    accepted, _ = actor.try_to_restore(copy.deepcopy(damaged), f"damaged  # {how}")
    if not accepted:
        what = f"restore() refused a snapshot ({how}), but changed the component"
        actor.run.same(before, actor.look(), what)
        actor.run.same_bytes(snapshot, dumps(actor.snapshot("_")), what)
    return accepted


@_law("what restore does not know is refused or kept", effort=0.1)
def _unknown(run: Attempt, first: list[Call], *_: Any) -> None:
    one = run.paused("component", first)
    for kind in ("section", "child"):
        newer = copy.deepcopy(one.snapshot())
        if kind == "section":
            newer.add_data_section(SnapshotDataSection(_UNKNOWN, b"from a newer version"))
        else:
            newer.add_snapshot(Snapshot(_UNKNOWN))
        given = dumps(newer)
        two = run.new("older")
        two.pause()
        before = two.look()
        accepted, report = two.try_to_restore(newer, f"saved_with_{kind}_{_UNKNOWN!r}")
        run.same_bytes(given, dumps(newer), "restore() changed the snapshot it was given")
        if not accepted:
            run.same(before, two.look(), f"restore() refused an unknown {kind}, but changed it")
            continue
        after = two.snapshot("again")
        kept = after.snapshot_data if kind == "section" else after.snapshots
        if _UNKNOWN not in kept and _UNKNOWN not in repr(report):
            run.fail(
                f"restore() lost a {kind} that it does not know, without a word: an older version "
                "would lose what a newer one wrote. Refuse it with a RestoreError "
                "(Snapshot.take does), or give it back in the next snapshot()"
            )


@_law("a snapshot survives being encoded and decoded")
def _encoded(run: Attempt, first: list[Call], *_: Any) -> None:
    one = run.paused("component", first)
    saved = one.snapshot()
    seen = one.look()
    for how, again in (
        ("loads(dumps(saved))", loads(dumps(saved))),
        ("saved_in_reverse_order", _reversed(saved)),
    ):
        two = run.new("restored")
        two.pause()
        two.restore(again, how)
        run.same(seen, two.look(), f"a component restored from {how} is not what was saved")


@_law("components share nothing")
def _share_nothing(
    run: Attempt, first: list[Call], later: list[Call], other: list[Call], *_: Any
) -> None:
    one, two = run.started("component"), run.started("other")
    two.pause()
    early = two.snapshot("early")
    untouched = two.look()
    one.do_all(first)
    one.pause()
    run.same(untouched, two.look(), "a component changed when another one did")
    seen, saved = one.look(), dumps(one.snapshot())
    two.resume()
    two.do_all([*other, *later])
    two.pause()
    run.same(seen, one.look(), "the component changed when another one did")
    two.restore(early, "early")
    run.same(seen, one.look(), "the component changed when another one was restored")
    run.same_bytes(saved, dumps(one.snapshot("_")), "its snapshot changed when another one did")


@_law(
    "what is sent can be received",
    effort=0.05,
    applies=lambda subject: (
        not isinstance(subject.factory, type)
        or (hasattr(subject.factory, "send") and hasattr(subject.factory, "recv"))
    ),
)
def _sent(run: Attempt, first: list[Call], *_: Any) -> None:
    one = run.started("component")
    if not is_transportable(one.component):
        raise SkipTest("the component has no send() and recv()")
    one.do_all(first)
    one.pause()
    saved = one.snapshot()
    received = one.sent_and_received(saved)
    run.same_snapshots(saved, received, "what was received is not what was sent")


@st.composite
def _damages(draw: st.DrawFn, saved: Snapshot) -> tuple[str, Snapshot, bool]:
    """What was done to a copy of a snapshot, the copy, and whether it must be refused.

    What is drawn does not depend on the snapshot, which may differ from one attempt to the next.
    """
    kinds = ["foreign", "emptied", "without a child", "without a section", *_CHANGES]
    kind = draw(st.sampled_from(kinds))
    which, at = draw(st.integers(0, 1 << 16)), draw(st.integers(0, 1 << 32))
    junk = draw(st.binary(min_size=1, max_size=4))
    damaged = loads(dumps(saved))
    places = [*damaged.walk()]
    sections = [(path, node, id) for path, node in places for id in node.snapshot_data]
    children = [(path, node, id) for path, node in places for id in node.snapshots]
    if kind == "foreign":
        strange = SnapshotDataSection("strange", b"\xff\x00strange")
        return "another component's", Snapshot(f"not {saved.id}", {}, {"strange": strange}), True
    if kind == "without a child" and children:
        path, node, id = children[which % len(children)]
        del node.snapshots[id]
        return f"without {path.child(id)}", damaged, False
    if kind == "emptied" or not sections:
        return "without any section or child", Snapshot(saved.id), False
    path, node, id = sections[which % len(sections)]
    place = path.section(id)
    payload = bytes(raw_view(node.snapshot_data[id].snapshot))
    if kind == "without a section" or not payload:
        del node.snapshot_data[id]
        return f"without {place}", damaged, False
    at %= len(payload)
    kind = kind if kind in _CHANGES else "altered"
    changed = _CHANGES[kind](payload, at, junk)
    if changed == payload:
        changed = payload + junk
    node.snapshot_data[id].snapshot = changed
    return f"{place} {kind} at byte {at} of {len(payload)}", damaged, False


_CHANGES: dict[str, Callable[[bytes, int, bytes], bytes]] = {
    "truncated": lambda payload, at, junk: payload[:at],
    "altered": lambda payload, at, junk: payload[:at] + junk + payload[at + len(junk) :],
    "lengthened": lambda payload, at, junk: payload[:at] + junk + payload[at:],
}


def _scribble(actor: Actor, snapshot: Snapshot, name: str = "saved") -> None:
    """Change all of a snapshot that can be changed."""
    actor.write(f"# everything in {name} is changed")
    for _, node in [*snapshot.walk()]:
        for section in node.snapshot_data.values():
            view = raw_view(section.snapshot)
            if not view.readonly:
                view[:] = bytes(byte ^ 0xFF for byte in view)
        node.snapshots.clear()
        node.snapshot_data.clear()
        node.id = "scribbled"


def _copied(saved: Snapshot, kind: Snapshot) -> Snapshot:
    """A copy whose payloads can be changed where those of ``kind`` can."""
    like = dict(kind.walk())
    for path, node in saved.walk():
        for id, section in node.snapshot_data.items():
            model = like[path].snapshot_data.get(id) if path in like else None
            mutable = model is not None and not raw_view(model.snapshot).readonly
            payload = bytes(raw_view(section.snapshot))
            section.snapshot = bytearray(payload) if mutable else payload
    return saved


def _reversed(snapshot: Snapshot) -> Snapshot:
    """The same snapshot, with everything in it in another order."""
    again = loads(dumps(snapshot))
    for _, node in [*again.walk()]:
        node.snapshots = dict(reversed(node.snapshots.items()))
        node.snapshot_data = dict(reversed(node.snapshot_data.items()))
    return again
