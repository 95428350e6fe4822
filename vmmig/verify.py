"""Whether a component fulfils a trait: everything that is wrong with it, said at once.

`verify` reads what is there and runs none of it. A member is looked up where Python would find
it, in the instance's ``__dict__`` and the classes it inherits from, but no property, descriptor,
``__getattr__`` or ``__getattribute__`` is asked. What only these could answer counts as missing.
A method whose parameters cannot be read so is accepted as it is: `functools.partial`, decorators
that are descriptors of their own, much that is written in C.

A method must take each argument both by position and under the contract's name for it. A wrapper
made with `functools.wraps` must take them by its own parameters; where these are ``*args`` or
``**kwargs``, so must what it wraps. Whether it is async is judged by the wrapper alone, because
that is what runs. Methods with double underscores are called by position only.

A class that was found to be in order is remembered, though not kept alive. If it or a base is
changed afterwards, it is not checked anew; instances that have a member of their own always are.
"""

from __future__ import annotations

import inspect
import sys
import types
import warnings
import weakref
from collections.abc import Iterator, Sequence
from functools import cached_property
from inspect import Parameter
from types import FunctionType, MemberDescriptorType
from typing import Any, Generic, Literal, Protocol, SupportsAbs

from attrs import frozen

from vmmig import traits
from vmmig.errors import ContractError, MigratableError

__all__ = ["DefaultMethodWarning", "verify"]

# The type's own accessors: a metaclass has no say in what they return.
_dict_of = type.__dict__["__dict__"].__get__
_mro_of = type.__dict__["__mro__"].__get__
_name_of = type.__dict__["__name__"].__get__

_attribute_of = object.__getattribute__
_keys_of = dict.keys

_ABSENT: Any = object()
_MAX_STEPS = 100
_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_NOT_PLAIN = {
    inspect.CO_COROUTINE: "an async function",
    inspect.CO_ASYNC_GENERATOR: "an async generator function",
    inspect.CO_GENERATOR: "a generator function",
}
_KEYWORD_ONLY = "parameter {} is keyword-only, the contract also passes it by position"
_C_METHODS = (
    types.ClassMethodDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
)


class DefaultMethodWarning(ContractError, UserWarning):
    """A component that has state runs on default methods, which do nothing and succeed.

    Attributes:
        problems: One text for each such method.

    >>> from vmmig.traits import Pausable
    >>> class Disk(Pausable):
    ...     def __init__(self): self.sectors = {}
    ...     def pause(self): ...
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     verify(Disk(), Pausable)
    ('resume',)
    >>> print(caught[0].message)
    Disk has state, but runs on default methods:
      - resume: is the default of Pausable, which does nothing
    """


def verify(
    component: object,
    protocol: type,
    *,
    defaults: Literal["warn", "error", "ignore"] = "warn",
) -> tuple[str, ...]:
    """Check that a component fulfils a contract, without running any of its code.

    Args:
        component: An instance, a module, or a class, whose instances then are meant. Of a mock
            its spec is checked.
        protocol: `vmmig.traits.Migratable` or any other `typing.Protocol` class. Its methods
            must be there and callable as it declares them; its other members must be there.
        defaults: What to do about default methods of vmmig's traits that a component with
            state inherits: warn of them, count them as errors, or nothing. A component has
            state if its ``__dict__`` holds anything, or if its class has an ``__init__``, a
            ``__new__`` (as every class written in C does) or slots.

    Returns:
        The names of the default methods of vmmig's traits that the component runs on.

    Raises:
        ContractError: The component does not fulfil the contract, or ``protocol`` is not a
            Protocol class; ``problems`` has everything that is wrong.
        DefaultMethodWarning: A warning filter turns warnings into errors.
        MigratableError: ``defaults`` is none of the three.

    >>> from vmmig.traits import Snapshottable
    >>> class Disk:
    ...     def pause(self, timeout_s): ...
    ...     async def resume(self): ...
    ...     def id(self): ...
    ...     def restore(self, state): ...
    >>> verify(Disk(), Snapshottable)
    Traceback (most recent call last):
    vmmig.errors.ContractError: Disk does not fulfil Snapshottable:
      - pause: requires timeout_s, which the contract does not pass
      - resume: is an async function; the contract calls it as a plain one
      - snapshot: missing
      - restore: parameter 1 is called state, the contract passes snapshot by name
    """
    if defaults not in ("warn", "error", "ignore"):
        raise MigratableError(f"defaults is 'warn', 'error' or 'ignore', not {defaults!r}")
    contract = _contracts.get(id(protocol)) or _contract(protocol)
    verdict = contract.verdicts.get(id(type(component)))
    if verdict is None or (
        verdict.has_dict
        and not _keys_of(_attribute_of(component, "__dict__")).isdisjoint(contract.names)
    ):
        verdict = _check(component, contract)
    if verdict.problems or (verdict.defaults and defaults != "ignore"):
        _report(component, contract, verdict, defaults)
    return verdict.defaults


@frozen(eq=False)
class _Verdict:
    problems: list[str]
    defaults: tuple[str, ...]
    default_problems: list[str]
    declares_state: bool
    has_dict: bool
    guard: object


@frozen(eq=False)
class _Contract:
    name: str
    members: dict[str, Sequence[Parameter] | None]
    """What is passed to each method; None for a member that is not called."""
    names: frozenset[str]
    verdicts: dict[int, _Verdict]
    """By the ids of the classes that fulfil it, as a metaclass may define a hash."""
    guard: object


_contracts: dict[int, _Contract] = {}


def _forgetting(subject: type, memory: dict[int, Any]) -> object:
    """Have what is remembered of a class forgotten before its id can be another's."""
    key = id(subject)
    return weakref.ref(subject, lambda _: memory.pop(key, None))


def _contract(protocol: Any) -> _Contract:
    if not issubclass(type(protocol), type) or _dict_of(protocol).get("_is_protocol") is not True:
        raise ContractError(
            f"the contract to verify is a typing.Protocol class, not {_described(protocol)}"
        )
    # What typing adds to a Protocol class is seen on one of its own.
    machinery = {
        *(_dict_of(SupportsAbs).keys() - {"__abs__"}),
        *("__annotations__", "__class_getitem__", "__dict__", "__match_args__", "__weakref__"),
        *("__callable_proto_members_only__", "__non_callable_proto_members__", "__type_params__"),
    }
    members: dict[str, Sequence[Parameter] | None] = {}
    for cls in reversed(_mro_of(protocol)):
        if cls not in (object, Protocol, Generic):
            for name in (*inspect.get_annotations(cls), *_dict_of(cls)):
                if name not in machinery:
                    members[name] = _passed(name, _dict_of(cls).get(name))
    contract = _contracts[id(protocol)] = _Contract(
        name=_name_of(protocol),
        members=members,
        names=frozenset(members),
        verdicts={},
        guard=_forgetting(protocol, _contracts),
    )
    return contract


def _passed(name: str, raw: object) -> Sequence[Parameter] | None:
    """What the contract passes to a method; None if it is not one."""
    function, skip = _bound(raw)
    if type(function) is not FunctionType or function is _unknown:
        return None
    parameters = _parameters(function)
    at = min(skip, sum(parameter.kind in _POSITIONAL for parameter in parameters))
    return [
        parameter.replace(kind=Parameter.POSITIONAL_ONLY)
        if _is_special(name) and parameter.kind is Parameter.POSITIONAL_OR_KEYWORD
        else parameter
        for parameter in parameters[at:]
    ]


def _check(component: Any, contract: _Contract) -> _Verdict:
    is_class = issubclass(type(component), type)
    subject: type = component if is_class else type(component)
    if is_class and (known := contract.verdicts.get(id(subject))):
        return known
    own = _own_members(component)
    is_mock = not is_class and _is_mock(subject)
    source, own = _as_specified(component, own, contract.names) if is_mock else (subject, own)
    problems: list[str] = []
    defaults: dict[str, str] = {}
    of_class = not is_mock
    for name, wanted in contract.members.items():
        raw = _lookup(source, name)
        value, skip = _bound(raw)
        if type(raw) is MemberDescriptorType:
            value, of_class = _slot(raw, component), False
        elif raw is _ABSENT:
            of_class = False
        elif type(raw) is FunctionType and raw.__globals__ is vars(traits) and not is_mock:
            trait = raw.__code__.co_qualname.partition(".")[0]
            defaults[name] = f"{name}: is the default of {trait}, which does nothing"
        if is_mock or not (_is_special(name) or _is_data_descriptor(raw)):
            found = dict.get(own, name, _ABSENT)
            if found is not _ABSENT:
                value, skip, of_class = found, 0, False
                defaults.pop(name, None)
        if value is _ABSENT:
            problems += _missing(name, wanted is None and is_class, raw, source)
        elif wanted is not None:
            problems += (f"{name}: {wrong}" for wrong in _call_problems(value, skip, wanted))
    verdict = _Verdict(
        problems=problems,
        defaults=tuple(defaults),
        default_problems=[*defaults.values()],
        declares_state=any(map(_declares_state, _mro_of(subject))),
        has_dict=_has_dict(subject),
        guard=_forgetting(subject, contract.verdicts),
    )
    # What is remembered of a metaclass would be taken for a verdict on its instances.
    if of_class and not problems and not issubclass(subject, type):
        contract.verdicts[id(subject)] = verdict
    return verdict


def _report(component: Any, contract: _Contract, verdict: _Verdict, defaults: str) -> None:
    problems = verdict.problems
    what = _described(component)
    if verdict.declares_state or dict.__len__(_own_members(component)):
        if defaults == "error":
            problems = problems + verdict.default_problems
        elif defaults == "warn" and verdict.defaults and not problems:
            text = f"{what} has state, but runs on default methods"
            warning = DefaultMethodWarning(text, problems=verdict.default_problems)
            warnings.warn(warning, stacklevel=3)
    if problems:
        raise ContractError(f"{what} does not fulfil {contract.name}", problems=problems)


def _missing(name: str, may_be_set_later: bool, raw: object, source: type) -> list[str]:
    if may_be_set_later:
        notes = [_dict_of(cls).get("__annotations__") for cls in _mro_of(source)]
        if raw is not _ABSENT or any(name in note for note in notes if type(note) is dict):
            return []
        return [f"{name}: missing in the class; if __init__ sets it, verify an instance"]
    if type(_lookup(source, "__getattr__")) is FunctionType:
        return [f"{name}: missing; __getattr__ is not asked for it, because that would run code"]
    return [f"{name}: missing"]


def _lookup(cls: type, name: str) -> Any:
    for base in _mro_of(cls):
        found = _dict_of(base).get(name, _ABSENT)
        if found is not _ABSENT:
            return found
    return _ABSENT


def _has_dict(cls: type) -> bool:
    """Whether instances have a ``__dict__`` that Python keeps, not a property of that name."""
    raw = _lookup(cls, "__dict__")
    return _is_one_of(type(raw), (types.GetSetDescriptorType, MemberDescriptorType)) and any(
        raw.__objclass__ is base for base in _mro_of(cls)
    )


def _own_members(component: object) -> dict[str, Any]:
    if issubclass(type(component), type) or not _has_dict(type(component)):
        return {}
    own: dict[str, Any] = _attribute_of(component, "__dict__")
    return own


def _slot(raw: Any, component: object) -> Any:
    try:
        return raw.__get__(component)
    except (AttributeError, TypeError):  # it is empty, or there is no instance
        return _ABSENT


def _has(kind: type, name: str) -> bool:
    return _lookup(kind, name) is not _ABSENT


def _is_data_descriptor(raw: object) -> bool:
    return _has(type(raw), "__set__") or _has(type(raw), "__delete__")


def _bound(raw: Any) -> tuple[Any, int]:
    """What a class's attribute is on an instance, and how many arguments come before others."""
    kind = type(raw)
    if kind is FunctionType or _is_one_of(kind, _C_METHODS):
        return raw, 1
    if kind is staticmethod or kind is classmethod:
        return raw.__func__, int(kind is classmethod)
    if kind is types.MethodType or issubclass(kind, cached_property) or _is_data_descriptor(raw):
        return raw, 0
    return _unknown if _has(kind, "__get__") else raw, 0


def _unknown(*args: object, **kwargs: object) -> None:
    """Stands for a callable whose parameters cannot be known without running it."""


def _call_problems(value: Any, skip: int, wanted: Sequence[Parameter]) -> list[str]:
    """What is wrong with a call that passes ``skip`` arguments and then what is wanted."""
    wrapped = False
    for _ in range(_MAX_STEPS):
        kind = type(value)
        if kind is FunctionType:
            for flag, what in _NOT_PLAIN.items():
                if value.__code__.co_flags & flag and not wrapped:
                    return [f"is {what}; the contract calls it as a plain one"]
            takes = _parameters(value)
            problems = _mismatches(takes, skip, wanted)
            is_open = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in takes)
            inner = dict.get(value.__dict__, "__wrapped__", _ABSENT)
            if problems or not is_open or inner is _ABSENT:
                return problems
            value, wrapped = inner, True
        elif kind is types.MethodType:
            value, skip = value.__func__, skip + 1
        # Of what is bound to anything but a module, inspect would ask that thing's __class__.
        elif _is_one_of(kind, _C_METHODS) or (
            kind is types.BuiltinFunctionType and type(value.__self__) is types.ModuleType
        ):
            try:
                takes = [*inspect.signature(value).parameters.values()]
            except ValueError:  # it does not say what it takes
                return []
            return _mismatches(takes, skip, wanted)
        elif not _has(kind, "__call__"):
            return [f"is of type {_name_of(kind)}, not a method"]
        elif _is_mock(kind, "AsyncMock"):
            return ["is an AsyncMock; the contract calls it as a plain function"]
        elif _is_mock(kind) and "__signature__" in _dict_of(kind):  # as autospec leaves it
            return _mismatches([*_dict_of(kind)["__signature__"].parameters.values()], skip, wanted)
        else:
            value, more = _bound(_lookup(kind, "__call__"))
            skip += more
    return [f"is wrapped more than {_MAX_STEPS} times"]


def _parameters(function: FunctionType) -> list[Parameter]:
    """What a function itself takes, whatever it wraps or says that it takes."""
    bare = FunctionType(function.__code__, {}, None, function.__defaults__, function.__closure__)
    bare.__kwdefaults__ = function.__kwdefaults__
    return [*inspect.signature(bare).parameters.values()]


def _mismatches(takes: list[Parameter], skip: int, wanted: Sequence[Parameter]) -> list[str]:
    """Where what a function takes differs from what the contract passes."""
    bound = [p for p in takes if p.kind in _POSITIONAL][:skip]
    kinds = {p.kind for p in takes}
    if len(bound) < skip and Parameter.VAR_POSITIONAL not in kinds:
        return ["takes no argument, not even self"]
    # A parameter may be found wrong by position and by name.
    return list(dict.fromkeys(_differences(bound, takes[len(bound) :], wanted)))


def _differences(
    bound: list[Parameter], takes: list[Parameter], wanted: Sequence[Parameter]
) -> Iterator[str]:
    kinds = {p.kind for p in takes}
    positional = [p for p in takes if p.kind in _POSITIONAL]
    keyword_only = {p.name for p in takes if p.kind is Parameter.KEYWORD_ONLY}
    passed = [p for p in wanted if p.kind in _POSITIONAL]
    passed_by_name = {p.name: p for p in wanted if p.kind is Parameter.KEYWORD_ONLY}
    filled = {p.name for p in (*bound, *positional[: len(passed)]) if _by_name(p)}
    rest = positional[len(passed) :]
    named = {p.name for p in rest if _by_name(p)} | keyword_only
    any_name = Parameter.VAR_KEYWORD in kinds

    for at, (given, own) in enumerate(zip(passed, positional, strict=False), start=1):
        if _by_name(given) and not _by_name(own):
            yield (
                f"parameter {at} ({own.name}) is positional-only, "
                f"the contract also passes {given.name} by name"
            )
        elif _by_name(given) and own.name != given.name:
            yield f"parameter {at} is called {own.name}, the contract passes {given.name} by name"
        if _required(own) and not _required(given):
            yield f"requires {own.name}, which the contract may leave out"
    for given in passed[len(positional) :]:
        if Parameter.VAR_POSITIONAL not in kinds:
            if given.name in keyword_only:
                yield _KEYWORD_ONLY.format(given.name)
            else:
                yield f"takes {_names(positional)}, the contract passes {_names(passed)}"
        elif _by_name(given) and (given.name in filled or not (any_name or given.name in named)):
            yield f"takes {given.name} by position only, the contract also passes it by name"

    any_number = any(p.kind is Parameter.VAR_POSITIONAL for p in wanted)
    if any_number:
        filled.update(p.name for p in rest if _by_name(p))
    for name in passed_by_name:
        if name in filled or not (any_name or name in named):
            yield f"does not take {name} by name, as the contract passes it"
    for own in (*(p for p in takes if p.name in keyword_only), *rest):
        filler = passed_by_name.get(own.name) if own.name in named else None
        if not _required(own) or (filler and _required(filler)):
            continue
        if filler:
            yield f"requires {own.name}, which the contract may leave out"
        elif own.name in keyword_only and any(own.name == p.name for p in passed):
            yield _KEYWORD_ONLY.format(own.name)
        else:
            yield f"requires {own.name}, which the contract does not pass"
    if any_number and Parameter.VAR_POSITIONAL not in kinds:
        yield "takes no *args, but the contract passes any number of arguments"
    if any(p.kind is Parameter.VAR_KEYWORD for p in wanted) and not any_name:
        yield "takes no **kwargs, but the contract passes arguments of any name"


def _by_name(parameter: Parameter) -> bool:
    return parameter.kind is Parameter.POSITIONAL_OR_KEYWORD


def _required(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty


def _names(parameters: list[Parameter]) -> str:
    return f"({', '.join(parameter.name for parameter in parameters)})"


def _declares_state(cls: type) -> bool:
    own = _dict_of(cls)
    if cls is object or own.get("_is_protocol") is True:
        return False
    # typing itself gives an heir of a Protocol object's own __init__ when it is first made.
    return (
        own.get("__init__", object.__init__) is not object.__init__
        or "__new__" in own
        or any(type(value) is MemberDescriptorType for value in own.values())
    )


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_one_of(kind: type, kinds: Sequence[type]) -> bool:
    """Membership by identity: a metaclass may define what is equal."""
    return any(kind is known for known in kinds)


def _is_mock(cls: type, name: str = "NonCallableMock") -> bool:
    """Whether it is a class of unittest.mock, which is not imported for that."""
    mock = getattr(sys.modules.get("unittest.mock"), name, None)
    return mock is not None and any(base is mock for base in _mro_of(cls))


def _as_specified(
    component: object, own: dict[str, Any], names: frozenset[str]
) -> tuple[type, dict[str, Any]]:
    """The class that a mock stands for, and what the mock has beside what that class has."""
    source: type = object if own["_spec_class"] is None else own["_spec_class"]
    spec = own["_mock_methods"]
    child = component if _is_mock(type(component), "AsyncMock") else _unknown
    made = {n: child for n in names if (spec is None or n in spec) and not _has(source, n)}
    return source, {**made, **own}


def _described(component: Any) -> str:
    cls: type = type(component)
    if issubclass(cls, type):
        return f"the class {_name_of(component)}"
    if issubclass(cls, types.ModuleType):
        return f"the module {_own_members(component).get('__name__')}"
    return str(_name_of(cls))
