"""verify: what it accepts, what it says of the rest, and that it runs none of it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import gc
import inspect
import itertools
import pickle
import sys
import threading
import types
import typing
import warnings
import weakref
from typing import Any, ClassVar, Protocol
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmig.errors import ContractError, MigratableError
from vmmig.traits import LiveMigratable, Migratable, Pausable, Snapshottable
from vmmig.verify import DefaultMethodWarning, verify


class Restorable(Protocol):
    def restore(self, snapshot): ...


class Polled(Protocol):
    def poll(self, timeout_s=1.0): ...


def problems(component: object, protocol: type, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ContractError) as caught:
        verify(component, protocol, **options)
    return caught.value.problems


def with_restore(restore: Any) -> Any:
    return type("Disk", (), {"restore": restore})()


class Disk:
    def __init__(self):
        self.sectors = {}

    def pause(self): ...
    def resume(self): ...
    def id(self): ...
    def snapshot(self): ...
    def restore(self, snapshot): ...
    def send(self, snapshot, destination_url): ...
    def recv(self, source_url): ...


def plain(self, snapshot): ...


async def coroutine(self, snapshot): ...


def wraps_open(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def wraps_closed(function):
    @functools.wraps(function)
    def wrapper(self, snapshot):
        return function(self, snapshot, "injected")

    return wrapper


class Slotted:
    __slots__ = ("restore",)

    def __init__(self, restore=None):
        if restore is not None:
            self.restore = restore


class Call:
    def __call__(self, snapshot): ...


class AsyncCall:
    async def __call__(self, snapshot): ...


class Binding:
    """A decorator that is a descriptor: how it binds cannot be known."""

    def __get__(self, instance, owner):
        raise AssertionError("ran")

    def __call__(self):
        raise AssertionError("ran")


class SelfCall:
    pass


SelfCall.__call__ = SelfCall()


class Declared:
    def restore(self, *args, **kwargs): ...

    restore.__signature__ = inspect.Signature(
        [
            inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY),
            inspect.Parameter("snapshot", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        ]
    )


GOOD = {
    "function": with_restore(plain),
    "staticmethod": with_restore(staticmethod(lambda snapshot: None)),
    "classmethod": with_restore(classmethod(plain)),
    "*args and **kwargs": with_restore(lambda *args, **kwargs: None),
    "*args and a name": with_restore(lambda self, *args, snapshot=None: None),
    "further defaults": with_restore(lambda self, snapshot, force=False, *, check=True: None),
    "partial": with_restore(functools.partial(lambda bus, snapshot: None, "bus")),
    "partial by name": with_restore(functools.partial(lambda snapshot, bus: None, bus="bus")),
    "partialmethod": with_restore(functools.partialmethod(lambda self, bus, snapshot: None, "b")),
    "partialmethod of a staticmethod": with_restore(
        functools.partialmethod(staticmethod(lambda bus, snapshot: None), "bus")
    ),
    "partialmethod of a callable": with_restore(
        functools.partialmethod(functools.partial(lambda bus, self, snapshot: None, "bus"))
    ),
    "wraps": with_restore(wraps_open(plain)),
    "wraps, injecting": with_restore(wraps_closed(lambda self, snapshot, lock: None)),
    "wraps a coroutine, itself plain": with_restore(wraps_open(coroutine)),
    "lru_cache": with_restore(functools.lru_cache(plain)),
    "bound method": with_restore(with_restore(plain).restore),
    "callable object": with_restore(Call()),
    "class": with_restore(dict),
    "descriptor that can be called": with_restore(Binding()),
    "declared signature": Declared(),
    "C, bound": types.SimpleNamespace(restore={}.get),
    "C, no signature": with_restore(dict.update),
    "in the instance": types.SimpleNamespace(restore=lambda snapshot: None),
    "in a slot": Slotted(lambda snapshot: None),
    "abstract, made concrete": type(
        "B",
        (type("A", (abc.ABC,), {"restore": abc.abstractmethod(lambda self: None)}),),
        {"restore": plain},
    ),
    "a class": Disk,
    "a class with a classmethod": type("A", (), {"restore": classmethod(plain)}),
    "a mock": mock.Mock(),
    "a mock with a spec": mock.Mock(spec=Restorable),
    "a mock with another class as spec": mock.NonCallableMock(spec=Disk),
    "a mock with an instance as spec": mock.MagicMock(spec=Disk()),
    "an async mock with a plain spec": mock.AsyncMock(spec=Restorable),
    "an autospec": mock.create_autospec(Restorable, instance=True),
    "an autospec of a class": mock.create_autospec(Disk),
    "a mock with a child": mock.Mock(spec=[], restore=mock.Mock()),
    "an autospec of a function": with_restore(mock.create_autospec(plain)),
    "a mock with a function": mock.Mock(spec=[], restore=lambda snapshot: None),
}


@pytest.mark.parametrize("component", GOOD.values(), ids=GOOD.keys())
def test_what_can_be_called_as_the_contract_does_is_accepted(component):
    assert verify(component, Restorable) == ()
    assert verify(component, Restorable) == ()


class Generator:
    def restore(self, snapshot):
        yield


class AsyncGenerator:
    async def restore(self, snapshot):
        yield


class HasGetattr:
    def __getattr__(self, name):
        raise AssertionError("ran")


class Metaclass(type):
    def restore(cls, snapshot): ...


PLAIN = "; the contract calls it as a plain one"
KEYWORD_ONLY = "parameter snapshot is keyword-only, the contract also passes it by position"
BAD = {
    "missing": (object(), "missing"),
    "missing in a class": (object, "missing"),
    "on the metaclass": (Metaclass("A", (), {})(), "missing"),
    "on the metaclass of the class": (Metaclass("A", (), {}), "missing"),
    "__getattr__": (
        HasGetattr(),
        "missing; __getattr__ is not asked for it, because that would run code",
    ),
    "None": (with_restore(None), "is of type NoneType, not a method"),
    "None over a method": (
        type("B", (type(with_restore(plain)),), {"restore": None})(),
        "is of type NoneType, not a method",
    ),
    "int": (with_restore(1), "is of type int, not a method"),
    "str": (types.SimpleNamespace(restore=""), "is of type str, not a method"),
    "property": (
        with_restore(property(plain)),
        "is of type property, not a method",
    ),
    "cached_property": (
        with_restore(functools.cached_property(plain)),
        "is of type cached_property, not a method",
    ),
    "property of the class": (
        with_restore(classmethod(property(plain))),
        "is of type property, not a method",
    ),
    "async": (with_restore(coroutine), "is an async function" + PLAIN),
    "generator": (Generator(), "is a generator function" + PLAIN),
    "async generator": (AsyncGenerator(), "is an async generator function" + PLAIN),
    "async bound method": (
        with_restore(with_restore(coroutine).restore),
        "is an async function" + PLAIN,
    ),
    "async __call__": (with_restore(AsyncCall()), "is an async function" + PLAIN),
    "async generator coroutine": (
        with_restore(types.coroutine(lambda self, snapshot: (yield))),
        "is a generator function" + PLAIN,
    ),
    "no self": (with_restore(lambda: None), "takes no argument, not even self"),
    "too few": (
        with_restore(lambda self: None),
        "takes (), the contract passes (snapshot)",
    ),
    "too few in a staticmethod": (
        with_restore(staticmethod(lambda: None)),
        "takes (), the contract passes (snapshot)",
    ),
    "too few behind wraps": (
        with_restore(wraps_open(lambda self: None)),
        "takes (), the contract passes (snapshot)",
    ),
    "too few in a class": (
        type("A", (), {"restore": lambda self: None}),
        "takes (), the contract passes (snapshot)",
    ),
    "too few in the instance": (
        types.SimpleNamespace(restore=lambda: None),
        "takes (), the contract passes (snapshot)",
    ),
    "too many": (
        with_restore(lambda self, snapshot, force: None),
        "requires force, which the contract does not pass",
    ),
    "too many by name": (
        with_restore(lambda self, snapshot, *, force: None),
        "requires force, which the contract does not pass",
    ),
    "renamed": (
        with_restore(lambda self, state: None),
        "parameter 1 is called state, the contract passes snapshot by name",
    ),
    "renamed beside **kwargs": (
        with_restore(lambda self, state=None, **more: None),
        "parameter 1 is called state, the contract passes snapshot by name",
    ),
    "positional-only": (
        with_restore(lambda self, snapshot, /: None),
        "parameter 1 (snapshot) is positional-only, the contract also passes snapshot by name",
    ),
    "keyword-only": (with_restore(lambda self, *, snapshot: None), KEYWORD_ONLY),
    "keyword-only after *args": (with_restore(lambda self, *args, snapshot: None), KEYWORD_ONLY),
    "*args alone": (
        with_restore(lambda self, *args: None),
        "takes snapshot by position only, the contract also passes it by name",
    ),
    "**kwargs alone": (
        with_restore(lambda self, **kwargs: None),
        "takes (), the contract passes (snapshot)",
    ),
    "C": (
        types.SimpleNamespace(restore=len),
        "parameter 1 (obj) is positional-only, the contract also passes snapshot by name",
    ),
    "C method": (
        with_restore(str.isascii),
        "takes (), the contract passes (snapshot)",
    ),
    "slot": (Slotted(), "missing"),
    "slot of a class": (Slotted, "missing"),
    "calls itself": (with_restore(SelfCall()), "is wrapped more than 100 times"),
    "module": (types.ModuleType("board"), "missing"),
    "mock without it": (mock.Mock(spec=["pause"]), "missing"),
    "mock, async": (
        mock.AsyncMock(),
        "is an AsyncMock; the contract calls it as a plain function",
    ),
    "mock of an async spec": (
        mock.Mock(spec=with_restore(coroutine)),
        "is an async function" + PLAIN,
    ),
    "mock with an async child": (
        mock.Mock(restore=mock.AsyncMock()),
        "is an AsyncMock; the contract calls it as a plain function",
    ),
    "mock with a child that cannot be called": (
        mock.Mock(restore=mock.NonCallableMock()),
        "is of type NonCallableMock, not a method",
    ),
    "autospec": (
        mock.create_autospec(with_restore(lambda self: None)),
        "takes (), the contract passes (snapshot)",
    ),
    "weak proxy": (weakref.proxy(_kept := with_restore(plain)), "missing"),
}


@pytest.mark.parametrize(("component", "problem"), BAD.values(), ids=BAD.keys())
def test_what_cannot_be_called_so_is_refused_with_the_reason(component, problem):
    assert problems(component, Restorable) == (f"restore: {problem}",)
    assert problems(component, Restorable) == (f"restore: {problem}",)


def test_everything_wrong_is_said_at_once_in_the_contracts_order():
    class Nic:
        async def pause(self): ...

        id = property(lambda self: "nic")

        def snapshot(self, compress): ...
        def restore(self): ...
        def send(self, snapshot, url): ...
        def recv(self, source_url, /, *, timeout_s): ...

    expected = (
        "pause: is an async function; the contract calls it as a plain one",
        "resume: missing",
        "id: is of type property, not a method",
        "snapshot: requires compress, which the contract does not pass",
        "restore: takes (), the contract passes (snapshot)",
        "send: parameter 2 is called url, the contract passes destination_url by name",
        "recv: parameter 1 (source_url) is positional-only, "
        "the contract also passes source_url by name",
        "recv: requires timeout_s, which the contract does not pass",
    )
    assert problems(Nic(), Migratable) == expected
    with pytest.raises(ContractError) as caught:
        verify(Nic, Migratable)
    assert str(caught.value).startswith("the class Nic does not fulfil Migratable:\n  - pause: ")
    assert caught.value.problems == expected
    assert pickle.loads(pickle.dumps(caught.value)).problems == expected


def test_what_is_written_in_c_is_checked_where_it_says_what_it_takes():
    class Number(Protocol):
        def to_bytes(self, length, byteorder="big"): ...

    class Bits(Protocol):
        def bit_length(self, base): ...

    class Register(int):
        pass

    assert verify(Register(), Number) == ()
    assert verify(Register, Number) == ()
    assert problems(Register(), Bits) == ("bit_length: takes (), the contract passes (base)",)


def test_swapped_parameters_are_refused():
    class Swapped(Disk):
        def send(self, destination_url, snapshot): ...

    assert len(problems(Swapped(), Migratable)) == 2


def test_what_the_contract_may_leave_out_must_be_optional():
    class Required:
        def poll(self, timeout_s): ...

    class Optional:
        def poll(self, timeout_s=0.0): ...

    assert verify(Optional(), Polled) == ()
    assert problems(Required(), Polled) == (
        "poll: requires timeout_s, which the contract may leave out",
    )


def test_a_module_is_a_component():
    board = types.ModuleType("board")
    exec("def pause(): ...\ndef resume(): ...", vars(board))
    assert verify(board, Pausable) == ()
    board.pause = plain
    with pytest.raises(ContractError, match="the module board does not fulfil Pausable"):
        verify(board, Pausable)


@pytest.mark.parametrize("make", [mock.Mock, mock.MagicMock, mock.NonCallableMock])
def test_a_mock_is_checked_against_its_spec(make):
    assert verify(make(spec=Migratable), Migratable) == ()
    assert verify(make(spec=LiveMigratable), Migratable) == ()
    assert problems(make(spec=Pausable), Snapshottable) == (
        "id: missing",
        "snapshot: missing",
        "restore: missing",
    )
    assert verify(mock.create_autospec(Migratable, instance=True), Migratable) == ()
    component = make(spec=Migratable)
    component.pause.assert_not_called()
    component.pause = coroutine
    assert problems(component, Migratable) == (
        "pause: is an async function; the contract calls it as a plain one",
    )


@pytest.mark.parametrize("protocol", [object, int, Disk, None, "Migratable", typing.Sized])
def test_only_a_protocol_is_a_contract(protocol):
    with pytest.raises(ContractError, match=r"a typing\.Protocol class, not"):
        verify(Disk(), protocol)


def test_an_unknown_choice_is_refused():
    with pytest.raises(MigratableError, match="'warn', 'error' or 'ignore'"):
        verify(Disk(), Migratable, defaults="raise")


# Protocols of the user's own


class Named(Protocol):
    name: str

    @property
    def size_bytes(self) -> int: ...


class Store(Named, typing.Sized, Protocol[typing.TypeVar("T")]):
    sync: ClassVar[bool] = False

    @staticmethod
    def parse(text): ...

    @classmethod
    def open(cls, path, *, mode="r"): ...

    def write(self, data, /, *more, at=0, **options): ...


class FileStore:
    name = "file"
    sync = True

    @property
    def size_bytes(self):
        raise AssertionError("ran")

    def __len__(self): ...
    def parse(self, text): ...
    def open(self, path, mode="w"): ...
    def write(self, first, *more, at=0, **options): ...


def test_a_protocols_data_must_be_there_and_its_methods_callable():
    assert verify(FileStore(), Store) == ()
    assert problems(object(), Store) == tuple(
        f"{name}: missing"
        for name in ("__len__", "name", "size_bytes", "sync", "parse", "open", "write")
    )
    component = FileStore()
    component.write = lambda data: None
    assert problems(component, Store) == (
        "write: does not take at by name, as the contract passes it",
        "write: takes no *args, but the contract passes any number of arguments",
        "write: takes no **kwargs, but the contract passes arguments of any name",
    )


def test_data_may_be_in_the_instance_a_slot_or_an_annotation_of_the_class():
    class InInit:
        size_bytes = 1

        def __init__(self):
            self.name = None

    class InSlot:
        __slots__ = ("name", "size_bytes")

    @dataclasses.dataclass
    class Annotated:
        name: str
        size_bytes: int

    assert verify(InInit(), Named) == ()
    assert verify(Annotated, Named) == ()
    assert verify(InSlot, Named) == ()
    assert problems(InSlot(), Named) == (
        "name: missing",
        "size_bytes: missing",
    )
    assert problems(InInit, Named) == (
        "name: missing in the class; if __init__ sets it, verify an instance",
    )


def test_a_mocks_data_is_there_if_its_spec_has_it():
    assert verify(mock.create_autospec(FileStore), Named) == ()
    assert verify(mock.Mock(spec=FileStore), Named) == ()
    assert problems(mock.Mock(spec=["name"]), Named) == ("size_bytes: missing",)


def test_special_methods_are_found_on_the_type_and_called_by_position():
    class Context(Protocol):
        def __enter__(self): ...
        def __exit__(self, exc_type, exc, traceback): ...

    class Lock:
        def __enter__(self): ...
        def __exit__(self, *info): ...

    assert verify(Lock(), Context) == ()
    assert verify(mock.MagicMock(), Context) == ()
    fake = types.SimpleNamespace(__enter__=lambda: None, __exit__=lambda *info: None)
    assert problems(fake, Context) == ("__enter__: missing", "__exit__: missing")


# Default methods


class Heir(Pausable):
    def pause(self): ...


class WithInit(Heir):
    def __init__(self):
        pass


class WithSlots(Heir):
    __slots__ = ("sectors",)


class WithAnnotation(Heir):
    sectors: dict


class InC(dict, Heir):
    pass


def with_attribute():
    heir = Heir()
    heir.sectors = {}
    return heir


STATEFUL = [
    WithInit(),
    WithInit,
    WithSlots(),
    WithSlots,
    InC(),
    with_attribute(),
]


@pytest.mark.parametrize("component", STATEFUL, ids=repr)
def test_a_default_under_state_is_warned_of_or_an_error(component):
    text = "resume: is the default of Pausable, which does nothing"
    for _ in range(2):
        with pytest.warns(DefaultMethodWarning, match="has state, but runs on default") as caught:
            assert verify(component, Pausable) == ("resume",)
        assert [warning.message.problems for warning in caught] == [(text,)]
        assert caught[0].filename == __file__
        assert problems(component, Pausable, defaults="error") == (text,)
        assert verify(component, Pausable, defaults="ignore") == ("resume",)


@pytest.mark.parametrize("component", [Heir(), Heir, WithAnnotation(), WithAnnotation], ids=repr)
def test_a_default_without_state_is_only_returned(component):
    assert verify(component, Pausable) == ("resume",)
    assert verify(component, Pausable, defaults="error") == ("resume",)


def test_every_default_counts_even_one_that_was_assigned():
    class Forgetful(LiveMigratable):
        def __init__(self):
            self.sectors = {}

    class Assigned(Disk):
        snapshot = Migratable.snapshot

    names = verify(Forgetful(), LiveMigratable, defaults="ignore")
    assert names[:7] == ("pause", "resume", "id", "snapshot", "restore", "send", "recv")
    assert len(names) == 12
    assert verify(Forgetful(), Pausable, defaults="ignore") == ("pause", "resume")
    assert verify(Assigned(), Migratable, defaults="ignore") == ("snapshot",)


def test_defaults_as_errors_are_said_along_with_the_rest():
    class Half(Heir):
        async def pause(self): ...

    half = Half()
    half.sectors = {}
    assert problems(half, Pausable) == (
        "pause: is an async function; the contract calls it as a plain one",
    )
    assert len(problems(half, Pausable, defaults="error")) == 2


def test_a_filter_makes_the_warning_an_error_of_vmmig():
    with warnings.catch_warnings(action="error"), pytest.raises(MigratableError, match="resume"):
        verify(WithInit(), Pausable)


def test_the_bodies_of_other_protocols_are_no_defaults():
    class Fallback(Protocol):
        def restore(self, snapshot): ...

    class User(Fallback):
        def __init__(self):
            pass

    assert verify(User(), Fallback) == ()


# Nothing is run


def trap(*args, **kwargs):
    raise AssertionError("code of the component was run")


class TrapDescriptor:
    __get__ = __set__ = __delete__ = __set_name__ = __getattr__ = __eq__ = trap
    __hash__ = None


class TrapMeta(type):
    __getattribute__ = __eq__ = __instancecheck__ = __subclasscheck__ = __call__ = trap
    __hash__ = __bool__ = __repr__ = __len__ = trap
    __name__ = __dict__ = __mro__ = property(trap)


def trapped_class():
    namespace = dict.fromkeys(
        ["__getattribute__", "__getattr__", "__eq__", "__bool__", "__len__", "__repr__", "__dir__"],
        trap,
    )
    namespace |= {"__hash__": trap, "__class__": property(trap), "__dict__": property(trap)}
    namespace |= {name: value for name, value in vars(Disk).items() if not name.startswith("__")}
    return type.__new__(TrapMeta, "Trapped", (), namespace)


def test_nothing_of_a_component_is_run():
    cls = trapped_class()
    component = object.__new__(cls)
    for subject in (component, cls, component, cls):
        assert verify(subject, Migratable) == ()
    cls = trapped_class()
    component = object.__new__(cls)
    type.__setattr__(cls, "pause", property(trap))
    type.__setattr__(cls, "resume", TrapDescriptor.__new__(TrapDescriptor))
    type.__setattr__(cls, "id", component)
    for subject in (component, cls):
        with pytest.raises(ContractError) as caught:
            verify(subject, Migratable)
        assert caught.value.problems == (
            "pause: is of type property, not a method",
            "resume: is of type TrapDescriptor, not a method",
            "id: is of type Trapped, not a method",
        )
        assert "Trapped does not fulfil Migratable" in str(caught.value)


def test_what_a_function_carries_is_not_run():
    component = object.__new__(trapped_class())

    def restore(*args, **kwargs): ...

    restore.__signature__ = restore.__wrapped__ = component
    restore._partialmethod = restore.__partialmethod__ = component
    assert problems(with_restore(restore), Restorable) == (
        "restore: is of type Trapped, not a method",
    )


def test_a_trapped_callable_is_read_not_called():
    callable_class = type.__new__(
        TrapMeta, "Callable", (), {"__call__": plain, "__getattribute__": trap}
    )
    assert verify(with_restore(object.__new__(callable_class)), Restorable) == ()
    assert verify(with_restore(callable_class), Restorable) == ()


def test_an_instance_dict_of_its_own_kind_is_not_run():
    class TrapDict(dict):
        __contains__ = __getitem__ = get = keys = __iter__ = __len__ = trap

    component = Disk()
    object.__setattr__(component, "__dict__", TrapDict(pause=1))
    assert problems(component, Migratable) == ("pause: is of type int, not a method",)


def test_what_c_code_is_bound_to_is_not_run():
    evil = type("Evil", (dict,), {"__class__": property(trap)})()
    assert verify(types.SimpleNamespace(restore=evil.get), Restorable) == ()


def test_what_stands_in_for_an_instance_dict_is_not_run():
    descriptor = type.__new__(TrapMeta, "Trapped", (), {"__get__": trap, "__eq__": trap})
    component = type("Hidden", (Disk,), {"__dict__": object.__new__(descriptor)})()
    assert verify(component, Migratable) == ()
    assert verify(component, Migratable) == ()


def test_mocks_are_not_made_or_recorded():
    component = mock.MagicMock(spec=Migratable)
    verify(component, Migratable)
    assert component.mock_calls == []
    assert object.__getattribute__(component, "__dict__")["_mock_children"] == {}


def test_unittest_mock_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "unittest.mock")
    assert verify(Disk(), Migratable) == ()
    assert problems(object(), Restorable) == ("restore: missing",)
    assert "unittest.mock" not in sys.modules


# What is remembered


def copy_of_disk(*bases):
    namespace = {name: value for name, value in vars(Disk).items() if callable(value)}
    return type("Copy", bases, namespace)


async def bad(self): ...


BAD_PAUSE = ("pause: is an async function; the contract calls it as a plain one",)


def test_a_class_changed_once_it_was_seen_is_not_checked_anew():
    cls = copy_of_disk()
    component = cls()
    assert verify(component, Migratable) == ()
    cls.pause = bad
    assert verify(component, Migratable) == verify(cls, Migratable) == ()
    assert problems(type("Heir", (cls,), {})(), Migratable) == BAD_PAUSE


def test_a_refused_class_is_checked_anew():
    cls = copy_of_disk()
    good, cls.pause = cls.pause, bad
    component = cls()
    assert problems(component, Migratable) == BAD_PAUSE
    cls.pause = good
    assert verify(component, Migratable) == ()


def test_an_instance_that_changes_its_class_is_judged_by_the_new_one():
    component = copy_of_disk()()
    assert verify(component, Migratable) == ()
    component.__class__ = type("Empty", (), {})
    assert problems(component, Pausable) == ("pause: missing", "resume: missing")


@pytest.mark.parametrize("first", ["instance", "class"])
def test_an_instances_own_members_are_noticed(first):
    seen = copy_of_disk()
    assert verify(seen if first == "class" else seen(), Migratable) == ()
    component, other = seen(), seen()
    component.pause = lambda force: None
    assert problems(component, Migratable) == (
        "pause: requires force, which the contract does not pass",
    )
    assert verify(other, Migratable) == ()
    component.pause = lambda: None
    assert verify(component, Migratable) == ()
    del component.pause
    assert verify(component, Migratable) == ()


def test_an_instances_own_members_say_nothing_of_the_class():
    cls = copy_of_disk()
    cls.pause = bad
    mended = cls()
    mended.pause = lambda: None
    assert verify(mended, Migratable) == ()
    assert problems(cls(), Migratable) == BAD_PAUSE


def test_a_mock_is_checked_each_time():
    component = mock.Mock(spec=Restorable)
    assert verify(component, Restorable) == ()
    component.restore = mock.AsyncMock()
    assert problems(component, Restorable) == (
        "restore: is an AsyncMock; the contract calls it as a plain function",
    )
    component = mock.Mock(spec=Restorable)
    assert verify(component, Restorable) == ()
    component.mock_add_spec(Pausable)
    assert problems(component, Restorable) == ("restore: missing",)


def test_a_data_descriptor_wins_over_the_instance():
    component = with_restore(property(trap, trap))
    vars(component)["restore"] = lambda snapshot: None
    assert problems(component, Restorable) == ("restore: is of type property, not a method",)


def test_a_verdict_on_a_metaclass_is_none_on_its_classes():
    class Meta(type):
        def pause(cls): ...
        def resume(cls): ...

    assert verify(Meta, Pausable) == ()
    assert problems(Meta("A", (), {}), Pausable) == ("pause: missing", "resume: missing")


def test_no_class_or_protocol_is_kept_alive():
    def make():
        class Device:
            def pause(self):
                super().pause()  # refers to the class

            def resume(self):
                return Device

        class Contract(Protocol):
            def pause(self): ...

        verify(Device(), Pausable)
        verify(Device, Contract)
        return weakref.ref(Device), weakref.ref(Contract)

    references = [make() for _ in range(20)]
    gc.collect()
    assert [alive for pair in references for ref in pair if (alive := ref())] == []


def test_new_classes_in_old_ones_memory_are_checked_anew():
    for k in range(300):
        namespace = {"pause": lambda self: None, "resume": (bad if k % 2 else lambda self: None)}
        component = type("Device", (), namespace)()
        if k % 2:
            assert len(problems(component, Pausable)) == 1
        else:
            assert verify(component, Pausable) == ()
        del component, namespace
        if k % 50 < 2:
            gc.collect()


def test_threads_agree_while_classes_come_and_go():
    start = threading.Barrier(4)
    unexpected = []

    def check(is_bad):
        start.wait()
        for k in range(300):
            cls = copy_of_disk()
            if is_bad := not is_bad:
                cls.pause = bad
            try:
                verify(cls(), Migratable)
                found = ()
            except ContractError as error:
                found = error.problems
            if found != (BAD_PAUSE if is_bad else ()):
                unexpected.append(found)
            if k % 100 == 0:
                gc.collect()

    threads = [threading.Thread(target=check, args=(k % 2 == 0,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert unexpected == []


# The law: accepted if and only if every call that the contract can make arrives

NAMES = "abcd"
Shape = tuple[int, int, tuple[str, ...], bool, tuple[tuple[str, bool], ...], bool]


@st.composite
def shapes(draw, variadic=True):
    """Positional-only count, first default, names, *args, keyword-only names, **kwargs."""
    names = draw(st.permutations(NAMES))
    count = draw(st.integers(0, 3))
    positional = tuple(names[:count])
    keyword = tuple((name, draw(st.booleans())) for name in names[count:] if draw(st.booleans()))
    return (
        draw(st.sampled_from([0, 0, 0, 1, 2])),
        draw(st.integers(0, count)),
        positional,
        variadic and draw(st.booleans()),
        keyword,
        variadic and draw(st.booleans()),
    )


def source(shape, body):
    positional_only, first_default, positional, var_positional, keyword, var_keyword = shape
    parts = ["self"]
    for at, name in enumerate(positional):
        parts.append(f"{name}=0" if at >= first_default else name)
        if at + 1 == positional_only:
            parts.append("/")
    if var_positional:
        parts.append("*args")
    elif keyword:
        parts.append("*")
    parts += (name if required else f"{name}=0" for name, required in keyword)
    if var_keyword:
        parts.append("**kwargs")
    return f"def call({', '.join(parts)}): {body}"


def method(shape):
    namespace: dict[str, Any] = {}
    exec(source(shape, "return locals()"), namespace)
    return namespace["call"]


def calls(shape):
    """Every way to call it: how many by position, which by name, what is left out."""
    positional_only, first_default, positional, _, keyword, _ = shape
    positional_only = positional_only if positional_only <= len(positional) else 0
    optional = [name for name, required in keyword if not required]
    for passed in range(first_default, len(positional) + 1):
        for split in range(min(positional_only, passed), passed + 1):
            for left_out in itertools.chain.from_iterable(
                itertools.combinations(optional, n) for n in range(len(optional) + 1)
            ):
                names = [*positional[split:passed], *(n for n, _ in keyword if n not in left_out)]
                yield positional[:split], {name: name for name in names}


def arrives(component_shape, contract_shape):
    """Whether each call arrives, and no argument in one parameter or another by how it is passed.

    Taking by position into a parameter of its own what by name goes elsewhere is a renaming.
    """
    component = type("Component", (), {"call": method(component_shape)})()
    landed: dict[str, set[str]] = {}
    for args, kwargs in calls(contract_shape):
        try:
            places = component.call(*args, **kwargs)
        except TypeError:
            return False
        for place, value in places.items():
            if isinstance(value, str):
                landed.setdefault(value, set()).add(place)
        for value in places.get("kwargs", {}):
            landed.setdefault(value, set()).add("kwargs")
    by_position = set(component_shape[2])
    return not any(len(places) > 1 and places & by_position for places in landed.values())


# (a, /, b) passed to (b, *args, **kwargs), and (a, /, *, b) to (b, **kwargs): b arrives twice.
@example((0, 1, ("b",), True, (), True), (1, 2, ("a", "b"), False, (), False))
@example((0, 1, ("b",), False, (), True), (1, 1, ("a",), False, (("b", True),), False))
@given(shapes(), shapes(variadic=False))
def test_a_method_is_accepted_if_and_only_if_the_contracts_calls_arrive(component, contract):
    protocol = type("Contract", (Protocol,), {"call": method(contract)})
    namespace = {"call": method(component)}
    instance = type("Component", (), namespace)()
    if arrives(component, contract):
        assert verify(instance, protocol) == ()
    else:
        assert problems(instance, protocol)
        assert all(text.startswith("call: ") for text in problems(instance, protocol))


@given(shapes(variadic=False))
def test_every_method_fulfils_its_own_contract(shape):
    protocol = type("Contract", (Protocol,), {"call": method(shape)})
    assert verify(type("Component", (), {"call": method(shape)})(), protocol) == ()
    assert verify(protocol, protocol) == ()
