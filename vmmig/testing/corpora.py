"""Golden corpora: what each release saved is kept, and today's code must restore it.

::

    corpus/
      1.3.0/                 a release
        spinning.vmsnap      what it saved of one example
        provenance.json      when, where and by what it was saved, and what was observed

A release's folder is written once, as a whole, and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import is_dataclass
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

import attrs
from hypothesis.errors import InvalidArgument

from vmmig import __version__, transport
from vmmig.codec import FORMAT_VERSION, loads
from vmmig.errors import MigratableError
from vmmig.migration import send
from vmmig.testing.attempts import BrokenLawError, Subject, named

_LAW = "what a release saved can be restored"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+!-]{0,99}")
_SUFFIX = ".vmsnap"
_PROVENANCE = "provenance.json"
_SHOWN_BYTES = 64

_Observed = str | dict[str, str] | None


def corpus(
    factory: Callable[[], Any],
    folder: str | os.PathLike[str],
    examples: Mapping[str, Callable[[], Any]],
    *,
    observe: Callable[[Any], object] | None = None,
    release: str | None = None,
) -> type:
    """A pytest class which proves that today's code restores what each release saved.

    Bind it to a name that pytest collects, such as ``TestDiskCorpus = corpus(Disk, "corpus",
    {"spinning": spinning_disk})``. ``pytest --vmmig-record`` then saves each example in the
    folder of the current release; every other run restores all that was ever recorded, one test
    for each file. What was recorded is never changed: to record a release again is an error.

    Args:
        factory: Makes a new component, as for `contract`; what was saved is restored into it.
        folder: Where the corpus is, and no other: relative to the file that calls this, or
            absolute.
        examples: Names, of letters, digits and ``._+!-``, each with a function that makes a
            component in a state worth keeping.
        observe: What can be seen of a component's state while it is paused, in plain values:
            numbers, texts, bytes, and sequences, sets and mappings of them. Where it gives a
            mapping by texts, a later release may add to it; all else must stay as recorded.
        release: The version under which to record. Without it, that of the distribution which
            the factory comes from.

    Raises:
        InvalidArgument: An argument is not what it should be.

    >>> class Disk:
    ...     def __init__(self, spinning=False): self.spinning = spinning
    >>> examples = {"idle": Disk, "spinning": lambda: Disk(spinning=True)}
    >>> TestDiskCorpus = corpus(Disk, "corpus", examples, observe=vars, release="1.3.0")
    >>> corpus(Disk, "corpus", {"../idle": Disk})
    Traceback (most recent call last):
    hypothesis.errors.InvalidArgument: examples has the name '../idle'; ...
    """
    subject = Subject.of(factory, None, observe, runs_by_itself=False)
    for name, make in examples.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InvalidArgument(
                f"examples has the name {name!r}; it must be of letters, digits and ._+!-, "
                "at most 100, and begin with a letter or digit"
            )
        if not callable(make):
            raise InvalidArgument(f"examples[{name!r}]={make!r} is not callable")
    if release is not None and not _NAME.fullmatch(release):
        raise InvalidArgument(f"release={release!r} is not a version")
    caller = sys._getframe(1).f_globals
    beside = Path(caller.get("__file__", "_")).absolute().parent
    kept = _Corpus(subject, beside / folder, dict(examples), release)

    def pytest_generate_tests(self: Any, metafunc: Any) -> None:
        cases = kept.cases(recording=metafunc.config.getoption("vmmig_record", False))
        metafunc.parametrize("case", cases.values(), ids=cases.keys())

    def test_golden(
        self: Any,
        case: Callable[[], str | None],
        request: Any,
    ) -> None:
        __tracebackhide__ = True
        recorded = case()
        if recorded is not None:
            request.node.user_properties.append(("vmmig_recorded", recorded))

    test_golden.vmmig_law = _LAW  # type: ignore[attr-defined]
    return type(
        f"Test{subject.name}Corpus",
        (),
        {
            "__doc__": f"What releases saved of {subject.name}.",
            "__module__": caller.get("__name__", __name__),
            "vmmig_component": subject.name,
            "vmmig_notes": () if observe else ("nothing observed of what is restored",),
            "pytest_generate_tests": pytest_generate_tests,
            "test_golden": test_golden,
        },
    )


class _Entry(NamedTuple):
    """What a provenance says of one file."""

    sha256: str
    observed: _Observed


@attrs.frozen
class _Corpus:
    """A folder of releases, and the component they saved."""

    subject: Subject
    folder: Path
    examples: dict[str, Callable[[], Any]]
    release: str | None

    def cases(self, *, recording: bool) -> dict[str, Callable[[], str | None]]:
        """What is to be tested, by a name for each."""
        if recording:
            return {"record": self.record}
        folders = [self.folder, *self.folder.iterdir()] if self.folder.is_dir() else []
        checks: dict[str, Callable[[], None]] = {}
        for folder in sorted(folders):
            files = {path.name for path in folder.glob(f"*{_SUFFIX}")}
            recorded = folder / _PROVENANCE
            if folder.name.startswith(".") or not (files or recorded.exists()):
                continue
            with suppress(BrokenLawError):
                files |= {*_entries(folder)}
            for file in sorted(files) or [_PROVENANCE]:
                checks[f"{folder.relative_to(self.folder)}/{file}"] = partial(
                    self.check, folder, file
                )
        return {**checks} or {"empty": self.refuse_to_be_empty}

    def refuse_to_be_empty(self) -> NoReturn:
        _fail(
            f"{self.folder}: nothing was ever recorded here, so nothing is proven; record the "
            "current release with pytest --vmmig-record, and keep what it writes under version "
            "control"
        )

    def check(self, folder: Path, file: str) -> None:
        __tracebackhide__ = True
        entries = _entries(folder)
        path = folder / file
        if not entries:
            _fail(f"{path}: it names no file, so nothing is proven; {_BRING_BACK}")
        if not (file.endswith(_SUFFIX) and _NAME.fullmatch(file.removesuffix(_SUFFIX))):
            _fail(f"{folder}: {file!r} cannot be the file of an example; {_BRING_BACK}")
        if file not in entries:
            _fail(f"{path}: its provenance does not name it, so nobody knows what is in it")
        if not path.exists():
            _fail(f"{path}: its provenance names it, but it is gone; {_BRING_BACK}")
        data = transport.recv(path)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != entries[file].sha256:
            _fail(
                f"{path}: it is not what was recorded: its sha256 is {sha256}, but its provenance "
                f"says {entries[file].sha256}. A golden file never changes; {_BRING_BACK}"
            )
        script = [f"saved = recv({str(path)!r})"]
        self.restore(str(path), data, entries[file].observed, script)

    def restore(self, what: str, data: memoryview, recorded: _Observed, script: list[str]) -> None:
        """Restore what was saved into a new component and compare what is seen of it."""
        __tracebackhide__ = True
        try:
            saved = loads(data)
            script.append("component = factory()")
            component = self.subject.factory()
            script.append("component.pause()")
            component.pause()
            script.append("component.restore(saved)")
            component.restore(saved)
            if recorded is None:
                return
            if self.subject.observe is None:
                _fail(f"{what}: it was recorded with an observe function; give it to corpus")
            script.append("observe(component)")
            seen = _observed(self.subject.observe(component))
        except BrokenLawError:
            raise
        except Exception as error:
            _fail(f"{what}: it cannot be restored today: {named(error)}", script, error)
        different = _difference(recorded, seen)
        if different:
            _fail(f"{what}: a component restored from it is not what was saved:{different}", script)

    def record(self) -> str:
        """Save each example under the current release: all of them, or nothing."""
        __tracebackhide__ = True
        if not self.examples:
            raise MigratableError(f"{self.folder}: there are no examples to record")
        release = self.release or _release_of(self.subject.factory)
        target = self.folder / release
        if os.path.lexists(target):
            raise MigratableError(
                f"{target}: release {release} is recorded already, and what is recorded never "
                "changes; raise the version first, or delete the folder if that release was "
                "never published"
            )
        part = self.folder / f".vmmig-{os.urandom(8).hex()}.part"
        try:
            part.mkdir(parents=True)
            files = {
                f"{name}{_SUFFIX}": self.record_example(part / f"{name}{_SUFFIX}", make)
                for name, make in sorted(self.examples.items())
            }
            text = json.dumps(_provenance(release) | {"files": files}, indent=2) + "\n"
            data = text.encode()
            transport.send([data], part / _PROVENANCE, total_bytes=len(data))
            part.rename(target)
            _fsync(self.folder)
        except OSError as error:
            raise MigratableError(
                f"{target}: it could not be recorded: {error.strerror}; nothing is recorded "
                "unless the folder is there"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return f"{len(files)} of {self.subject.name} in {target}"

    def record_example(self, path: Path, make: Callable[[], Any]) -> dict[str, object]:
        """Save one example, if today's code restores what it saves, and say what was saved."""
        __tracebackhide__ = True
        try:
            component = make()
            component.pause()
            saved = component.snapshot()
            observe = self.subject.observe
            observed = _observed(observe(component)) if observe else None
            send(saved, path)
            data = transport.recv(path)
            what = f"the example {path.stem!r}"
            script = [
                f"component = examples[{path.stem!r}]()",
                "component.pause()",
                "saved = component.snapshot()",
            ]
            self.restore(what, data, observed, script)
        except Exception as error:
            raise MigratableError(
                f"{self.folder}: nothing is recorded, because of the example {path.stem!r}: "
                f"{named(error)}"
            ) from error
        sha256 = hashlib.sha256(data).hexdigest()
        return {"sha256": sha256, "size_bytes": len(data), "observed": observed}


_BRING_BACK = "bring it back from version control"


def _fail(what: str, script: Sequence[str] = (), cause: Exception | None = None) -> NoReturn:
    __tracebackhide__ = True
    raise BrokenLawError(_LAW, what, script) from cause


def _provenance(release: str) -> dict[str, object]:
    return {
        "release": release,
        "recorded_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "vmmig": __version__,
        "format": FORMAT_VERSION,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": f"{sys.platform}-{platform.machine()}",
    }


def _entries(folder: Path) -> dict[str, _Entry]:
    """What a release's provenance says of its files."""
    __tracebackhide__ = True
    path = folder / _PROVENANCE
    try:
        said = json.loads(path.read_bytes())
        entries = {
            str(file): _Entry(entry["sha256"], entry["observed"])
            for file, entry in said["files"].items()
        }
        release = said["release"]
    except FileNotFoundError:
        _fail(f"{folder}: there is no {_PROVENANCE}, so nobody knows what is in it; {_BRING_BACK}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        _fail(f"{path}: it is damaged ({named(error)}); {_BRING_BACK}", cause=error)
    if release != folder.name:
        _fail(f"{path}: it is of release {release!r}, but its folder is {folder.name!r}")
    return entries


def _release_of(factory: Callable[[], Any]) -> str:
    """The version of the distribution that a factory comes from."""
    package = (getattr(factory, "__module__", None) or "").partition(".")[0]
    names = {*metadata.packages_distributions().get(package, [package])}
    with suppress(metadata.PackageNotFoundError, ValueError):
        (name,) = names
        version = metadata.version(name)
        if _NAME.fullmatch(version):
            return version
    raise MigratableError(
        f"it is not known which release this is: {package!r}, where {factory!r} comes from, is "
        "not part of one installed distribution; give its version to corpus(..., release=...)"
    )


def _observed(value: object) -> _Observed:
    """What was observed, as texts that are the same in every process and every Python."""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _text(value[key]) for key in sorted(value)}
    return _text(value)


def _text(value: object) -> str:
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, str):
        return repr(str(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return repr(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, Mapping):
        items = sorted((_text(key), _text(each)) for key, each in value.items())
        return "{" + ", ".join(f"{key}: {each}" for key, each in items) + "}"
    if isinstance(value, Set):
        return "{" + ", ".join(sorted(map(_text, value))) + "}"
    with suppress(TypeError):
        data = memoryview(cast(Any, value)).tobytes()
        if len(data) <= _SHOWN_BYTES:
            return repr(data)
        return f"{len(data)} bytes with the sha256 {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_text, value)) + "]"
    own_text: object = type(value).__repr__
    if hasattr(value, "__dict__") and (own_text is object.__repr__ or is_dataclass(type(value))):
        return f"{type(value).__qualname__}({_text(vars(value))})"
    text = repr(value)
    if " at 0x" in text:
        raise InvalidArgument(
            f"observe gave {text}, which is another text in every process; give plain values"
        )
    return text


def _difference(recorded: _Observed, seen: _Observed) -> str:
    """What is not as recorded; a mapping may have more than it had."""
    pairs: list[tuple[str, object, object]] = [("", recorded, seen)]
    if isinstance(recorded, dict) and isinstance(seen, dict):
        pairs = [(f"{key!r}: ", text, seen.get(key)) for key, text in recorded.items()]
    return "".join(
        f"\n  {key}recorded: {_excerpt(old, new)}\n  {key}today:    {_excerpt(new, old)}"
        for key, old, new in pairs
        if old != new
    )


def _excerpt(text: object, other: object) -> str:
    """A text from a little before the place where it begins to differ from another."""
    one, two = str(text), str(other)
    alike = next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), 0)
    start = max(0, alike - 60)
    return "..." * bool(start) + one[start : start + 300]


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
