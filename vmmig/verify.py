"""Whether a component fulfils a trait: everything that is wrong with it, said at once.

`verify` reads what is there and runs none of it. A member is looked up where Python would find
it, in the instance's ``__dict__`` and the classes it inherits from, but no property, descriptor,
``__getattr__`` or ``__getattribute__`` is asked. What only these could answer counts as missing,
and a method whose parameters cannot be read (many written in C, decorators that are descriptors
of their own) is accepted as it is.

A method must take each argument both by position and under the contract's name for it. A wrapper
made with `functools.wraps` must take them by its own parameters; where these are ``*args`` or
``**kwargs``, so must what it wraps. Whether it is async is judged by the wrapper alone, because
that is what runs. Methods with double underscores are called by position only.

A class that was found to be in order, by plain functions alone, is remembered and not kept alive.
It is checked anew when it or a base has changed since; a function changed in place (its
``__code__`` or ``__defaults__``) is not noticed.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial, partialmethod
from inspect import (
    CO_ASYNC_GENERATOR,
    CO_COROUTINE,
    CO_GENERATOR,
    CO_ITERABLE_COROUTINE,
    CO_VARARGS,
    CO_VARKEYWORDS,
    Parameter,
    Signature,
    get_annotations,
    signature,
)
from operator import itemgetter
from struct import calcsize
from types import (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import (
    Any,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    Protocol,
    TypeVar,
    get_origin,
    runtime_checkable,
)

from vmmig import traits
from vmmig.errors import ContractError, MigratableError

__all__ = ["DefaultMethodWarning", "verify"]

_T_co = TypeVar("_T_co", covariant=True)

# The type's own accessors: a metaclass has no say in what they return.
_dict_of = type.__dict__["__dict__"].__get__
_mro_of = type.__dict__["__mro__"].__get__
_name_of = type.__dict__["__name__"].__get__

_ABSENT: Any = object()
_MAX_STEPS = 100
_KEYWORD_ONLY = "parameter {} is keyword-only, the contract also passes it by position"
_POINTER_BYTES = calcsize("P")
_ASYNC = CO_COROUTINE | CO_ITERABLE_COROUTINE
_CACHED_FUNCTION = type(lru_cache(lambda: None))
_CLASS_VAR = type(ClassVar[int])
_C_CALLABLES = (
    BuiltinFunctionType,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
_BOUND_TO_INSTANCE = (
    FunctionType,
    _CACHED_FUNCTION,
    ClassMethodDescriptorType,
    MethodDescriptorType,
    WrapperDescriptorType,
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
            state if its ``__dict__`` holds anything, or if its class gives it a place for
            some: an ``__init__`` or ``__new__``, slots, annotated attributes, a base in C.

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
    subject: Any = type(component)
    own: dict[str, Any] = {}
    if issubclass(subject, type):
        subject = component
    else:
        own = _instance_dict(component)
    verdict = contract.verdicts.get(id(subject))
    if (
        verdict is None
        or not _still_so(verdict.sources, subject)
        or not dict.keys(own).isdisjoint(contract.names)
    ):
        verdict = _check(component, subject, own, contract, defaults == "error")
    found = verdict.defaults
    if found and defaults != "ignore" and (verdict.declares_state or dict.__len__(own)):
        _report(component, contract, found, defaults)
    return found


class _Parameter(NamedTuple):
    name: str
    required: bool
    by_name: bool
    """Whether it can be passed by its name."""


class _Parameters(NamedTuple):
    """What a function takes, or what a contract passes."""

    positional: Sequence[_Parameter]
    keyword: dict[str, bool]
    """By name only; whether each is required."""
    var_positional: bool
    var_keyword: bool


class _Source(NamedTuple):
    """What one class of a component's MRO has to say about the members not yet found."""

    class_id: int
    absent: tuple[str, ...]
    """The members it does not have."""
    present: Callable[[Any], tuple[Any, ...]] | None
    """Gets those that it has from its ``__dict__``."""
    present_ids: list[int]


class _Verdict(NamedTuple):
    """What is known of a class that fulfils a contract."""

    sources: tuple[_Source, ...]
    defaults: tuple[str, ...]
    declares_state: bool
    guards: tuple[object, ...]
    """Weak references to all that the sources name: the verdict goes when one of them does, so
    no id in it can come to mean something else. Strong ones would keep the class alive."""


class _Contract(NamedTuple):
    name: str
    members: dict[str, _Parameters | None]
    """How each method is called; None for a member that is not called."""
    names: tuple[str, ...]
    default_methods: dict[str, tuple[object, str]]
    """The default bodies from vmmig's traits, each with the trait's name."""
    verdicts: dict[int, _Verdict]
    guard: object


_contracts: dict[int, _Contract] = {}


@runtime_checkable
class _Empty(Protocol[_T_co]):
    __slots__ = ()


def _contract(protocol: Any) -> _Contract:
    if not issubclass(type(protocol), type) or not _dict_of(protocol).get("_is_protocol"):
        raise ContractError(
            f"the contract to verify is a typing.Protocol class, not {_described(protocol)}"
        )
    raw: dict[str, Any] = {}
    classes = [
        cls for cls in _mro_of(protocol) if cls is not object and cls not in (Protocol, Generic)
    ]
    machinery = {
        *_dict_of(_Empty),
        *("__annotations__", "__class_getitem__", "__dict__", "__match_args__", "__weakref__"),
        *("__callable_proto_members_only__", "__non_callable_proto_members__", "__type_params__"),
    }
    for cls in reversed(classes):
        for name in (*get_annotations(cls), *_dict_of(cls)):
            if name not in machinery:
                raw[name] = _dict_of(cls).get(name)
    drop = partial(_contracts.pop, id(protocol), None)
    contract = _Contract(
        name=_name_of(protocol),
        members={name: _passed(name, value) for name, value in raw.items()},
        names=tuple(raw),
        default_methods={
            name: (value, _name_of(cls))
            for cls in classes
            if _dict_of(cls).get("__module__") == traits.__name__
            for name, value in raw.items()
            if _dict_of(cls).get(name) is value
        },
        verdicts={},
        guard=weakref.ref(protocol, lambda _: drop()),
    )
    _contracts[id(protocol)] = contract
    return contract


def _passed(name: str, raw: object) -> _Parameters | None:
    """What the contract passes to a method; None if it is not one."""
    function, skip, _ = _bound(raw)
    if type(function) is not FunctionType or function is _unknown:
        return None
    parameters = _parameters(function)
    positional = parameters.positional[skip:]
    if _is_special(name):
        positional = [parameter._replace(by_name=False) for parameter in positional]
    return parameters._replace(positional=positional)


def _check(
    component: object,
    subject: type,
    own: dict[str, Any],
    contract: _Contract,
    defaults_are_errors: bool,
) -> _Verdict:
    sources, members, guarded = _sources(subject, contract.names)
    problems: list[str] = []
    defaults: list[str] = []
    from_class = True
    for name, wanted in contract.members.items():
        raw = members.get(name, _ABSENT)
        found = dict.get(own, name, _ABSENT)
        if found is not _ABSENT and not _is_special(name) and not _is_data_descriptor(raw):
            callee = _Callee(found)
            from_class = False
        elif raw is _ABSENT:
            callee = _Callee(_mocked(type(component), own, name))
            from_class = False
        elif type(raw) is MemberDescriptorType:
            callee = _Callee(_slot(component, subject, raw))
            from_class = False
        else:
            callee = _bound(raw)
            if raw is contract.default_methods.get(name, (None,))[0]:
                defaults.append(name)
        if callee.value is _ABSENT:
            problems += _missing(component, subject, name, raw, wanted)
        elif wanted is not None:
            found_wrong = _call_problems(callee, wanted)
            if not found_wrong and component is subject and _is_abstract(subject, name):
                found_wrong = ["is abstract"]
            problems += (f"{name}: {problem}" for problem in found_wrong)
    declares_state = any(map(_declares_state, _mro_of(subject))) or _has_room_for_state(subject)
    verdict = _Verdict(sources, tuple(defaults), declares_state, ())
    if problems:
        if defaults_are_errors and (declares_state or dict.__len__(own)):
            problems += _default_problems(contract, verdict.defaults)
        raise ContractError(
            f"{_described(component)} does not fulfil {contract.name}", problems=problems
        )
    if from_class and all(type(raw) is FunctionType for raw in members.values()):
        drop = partial(contract.verdicts.pop, id(subject), None)
        guards = (*(weakref.ref(value, lambda _: drop()) for value in guarded),)
        contract.verdicts[id(subject)] = verdict._replace(guards=guards)
    return verdict


def _sources(
    subject: type, names: Sequence[str]
) -> tuple[tuple[_Source, ...], dict[str, Any], list[Any]]:
    """Where the members are found, what they are there, and what must live for this to hold."""
    sources: list[_Source] = []
    members: dict[str, Any] = {}
    guarded: list[Any] = []
    for cls in _mro_of(subject):
        if not names:
            break
        own = _dict_of(cls)
        every = ((name, own.get(name, _ABSENT)) for name in names)
        here = {name: value for name, value in every if value is not _ABSENT}
        names = tuple(name for name in names if name not in here)
        # An itemgetter of one name would return no tuple.
        wanted = [*here] * 2 if len(here) == 1 else [*here]
        present = itemgetter(*wanted) if wanted else None
        sources.append(_Source(id(cls), names, present, [id(here[name]) for name in wanted]))
        members |= here
        guarded += (cls, *here.values())
    return tuple(sources), members, guarded


def _still_so(sources: tuple[_Source, ...], subject: type) -> bool:
    try:
        for cls, (class_id, absent, present, ids) in zip(_mro_of(subject), sources):  # noqa: B905
            own = _dict_of(cls)
            if (
                id(cls) != class_id
                or (absent and not own.keys().isdisjoint(absent))
                or (present is not None and [*map(id, present(own))] != ids)
            ):
                return False
    except KeyError:
        return False
    return True


def _report(component: object, contract: _Contract, defaults: tuple[str, ...], action: str) -> None:
    text = f"{_described(component)} has state, but runs on default methods"
    problems = _default_problems(contract, defaults)
    if action == "error":
        raise ContractError(text, problems=problems)
    warnings.warn(DefaultMethodWarning(text, problems=problems), stacklevel=3)


def _default_problems(contract: _Contract, defaults: Iterable[str]) -> list[str]:
    return [
        f"{name}: is the default of {contract.default_methods[name][1]}, which does nothing"
        for name in defaults
    ]


def _missing(
    component: object, subject: type, name: str, raw: object, wanted: _Parameters | None
) -> list[str]:
    if raw is not _ABSENT:
        if component is subject:
            return [] if wanted is None else [f"{name}: is a slot, which only an instance fills"]
        return [f"{name}: missing, its slot is empty"]
    if component is subject and wanted is None:
        if any(name in _annotations(cls) for cls in _mro_of(subject)):
            return []
        return [
            f"{name}: the class neither has nor declares it; if __init__ sets it, "
            "verify an instance"
        ]
    for hook in ("__getattr__", "__getattribute__"):
        if type(_lookup(subject, hook)) is FunctionType and not _is_mock(subject):
            return [f"{name}: missing; {hook} is not asked for it, because that would run code"]
    return [f"{name}: missing"]


def _lookup(cls: type, name: str) -> Any:
    for base in _mro_of(cls):
        found = _dict_of(base).get(name, _ABSENT)
        if found is not _ABSENT:
            return found
    return _ABSENT


def _instance_dict(component: object) -> dict[str, Any]:
    for cls in _mro_of(type(component)):
        raw = _dict_of(cls).get("__dict__")
        kind = type(raw)
        if kind is GetSetDescriptorType or kind is MemberDescriptorType:
            try:
                own = raw.__get__(component)
            except TypeError:
                continue
            return own if issubclass(type(own), dict) else {}
    return {}


def _slot(component: object, subject: type, raw: MemberDescriptorType) -> Any:
    if component is subject or not any(raw.__objclass__ is base for base in _mro_of(subject)):
        return _ABSENT
    try:
        return raw.__get__(component)
    except AttributeError:
        return _ABSENT


def _is_one_of(kind: type, kinds: Iterable[type]) -> bool:
    """Membership by identity: a metaclass may define what is equal and what the hash is."""
    return any(kind is known for known in kinds)


def _is_data_descriptor(raw: object) -> bool:
    kind = type(raw)
    return _lookup(kind, "__set__") is not _ABSENT or _lookup(kind, "__delete__") is not _ABSENT


class _Callee(NamedTuple):
    """Something that is called with the contract's arguments and some that come before them."""

    value: Any
    skip: int = 0
    """How many arguments are passed before the contract's, such as ``self``."""
    given: frozenset[str] = frozenset()
    """The names of those that are passed by name."""


def _bound(raw: Any) -> _Callee:
    """What a class's attribute becomes on an instance."""
    kind = type(raw)
    if _is_one_of(kind, _BOUND_TO_INSTANCE):
        return _Callee(raw, 1)
    if kind is staticmethod:
        return _Callee(raw.__func__)
    if kind is partial:  # a method from Python 3.14 on, as it was announced in 3.13
        return _Callee(raw, int(sys.version_info >= (3, 14)))
    if kind is classmethod:
        return _Callee(raw.__func__, 1)
    if kind is partialmethod:
        value, skip, given = _bound(raw.func)
        if value is raw.func and skip == 0:  # it does not bind, so the instance is passed on
            skip = 1
        return _Callee(value, skip + len(raw.args), given | raw.keywords.keys())
    if kind is MethodType or _lookup(kind, "__get__") is _ABSENT:
        return _Callee(raw)
    if _is_mock(kind, "MagicProxy"):
        return _Callee(_unknown)
    if _lookup(kind, "__call__") is _ABSENT or _is_mock(kind):
        return _Callee(raw)
    return _Callee(_unknown)


def _unknown(*args: object, **kwargs: object) -> None:
    """Stands for a callable whose parameters cannot be known without running it."""


async def _unknown_async(*args: object, **kwargs: object) -> None:
    """Stands for an async one."""


def _call_problems(callee: _Callee, wanted: _Parameters) -> list[str]:
    """What is wrong with calling ``callee`` as the contract does."""
    value, skip, given = callee
    wrapped = False
    for _ in range(_MAX_STEPS):
        kind = type(value)
        if kind is FunctionType:
            if not wrapped and (what := _not_plain(value)):
                return [f"is {what}; the contract calls it as a plain one"]
            takes = _parameters(value)
            problems = _mismatches(takes, skip, given, wanted)
            if problems or not (takes.var_positional or takes.var_keyword):
                return problems
            declared = value.__dict__.get("__signature__")
            if type(declared) is Signature:
                return _mismatches(_parameters_of(declared), skip, given, wanted)
            if "__wrapped__" not in value.__dict__:
                return []
            value, wrapped = value.__dict__["__wrapped__"], True
        elif kind is MethodType:
            value, skip = value.__func__, skip + 1
        elif kind is partial:
            value, skip, given = value.func, skip + len(value.args), given | value.keywords.keys()
        elif kind is _CACHED_FUNCTION:
            value = value.__dict__.get("__wrapped__", _unknown)
        elif _is_one_of(kind, _C_CALLABLES):
            try:
                declared = signature(value)
            except (TypeError, ValueError):
                return []
            return _mismatches(_parameters_of(declared), skip, given, wanted)
        elif issubclass(kind, type):
            return []
        elif value is None:
            return ["is None, which means that it is not supported"]
        elif (call := _lookup(kind, "__call__")) is _ABSENT or _is_mock(kind, "PropertyMock"):
            if _lookup(kind, "__get__") is not _ABSENT:
                return [f"is {_a(kind)}; the contract calls it as a method"]
            return [f"is {_a(kind)}, which cannot be called"]
        elif _is_mock(kind):
            if _is_mock(kind, "AsyncMock"):
                return ["is an AsyncMock; the contract calls it as a plain function"]
            declared = _dict_of(kind).get("__signature__")
            if type(declared) is not Signature:
                return []
            return _mismatches(_parameters_of(declared), skip, given, wanted)
        else:
            value, more, also_given = _bound(call)
            skip, given = skip + more, given | also_given
    return [f"is wrapped more than {_MAX_STEPS} times"]


def _not_plain(function: FunctionType) -> str | None:
    flags = function.__code__.co_flags
    # The mark is that of inspect.markcoroutinefunction, which is new in Python 3.12.
    if flags & _ASYNC or "_is_coroutine_marker" in function.__dict__:
        return "an async function"
    if flags & CO_ASYNC_GENERATOR:
        return "an async generator function"
    return "a generator function" if flags & CO_GENERATOR else None


def _parameters(function: FunctionType) -> _Parameters:
    """What a Python function itself takes, whatever it wraps or says that it takes."""
    code = function.__code__
    count = code.co_argcount
    required = count - len(function.__defaults__ or ())
    optional = function.__kwdefaults__ or {}
    names = code.co_varnames
    return _Parameters(
        [
            _Parameter(name, at < required, at >= code.co_posonlyargcount)
            for at, name in enumerate(names[:count])
        ],
        {name: name not in optional for name in names[count : count + code.co_kwonlyargcount]},
        bool(code.co_flags & CO_VARARGS),
        bool(code.co_flags & CO_VARKEYWORDS),
    )


def _parameters_of(declared: Signature) -> _Parameters:
    parameters = declared.parameters.values()
    kinds = {parameter.kind for parameter in parameters}
    return _Parameters(
        [
            _Parameter(
                parameter.name,
                parameter.default is Parameter.empty,
                parameter.kind is Parameter.POSITIONAL_OR_KEYWORD,
            )
            for parameter in parameters
            if parameter.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
        ],
        {
            parameter.name: parameter.default is Parameter.empty
            for parameter in parameters
            if parameter.kind is Parameter.KEYWORD_ONLY
        },
        Parameter.VAR_POSITIONAL in kinds,
        Parameter.VAR_KEYWORD in kinds,
    )


def _mismatches(
    takes: _Parameters, skip: int, given: frozenset[str], wanted: _Parameters
) -> list[str]:
    """Where what a function takes differs from what the contract passes."""
    if skip > len(takes.positional) and not takes.var_positional:
        if not takes.positional:
            return ["takes no argument, not even self"]
        return [f"takes {_counted(len(takes.positional))}, but is bound to {skip} already"]
    filled = {p.name for p in takes.positional[:skip] if p.by_name}
    free = takes.positional[skip:]
    keyword = dict(takes.keyword)
    for at, parameter in enumerate(free):
        if parameter.by_name and parameter.name in given:
            # Passed by name, it and all after it can no longer be reached by position.
            keyword |= {p.name: p.required for p in free[at:]}
            free = free[:at]
            takes = takes._replace(var_positional=False)
            break
    for name in sorted(given):
        if name in filled or not (takes.var_keyword or name in keyword):
            return [f"is a partial that passes {name} by name, but its function cannot take it so"]
    keyword = {name: required and name not in given for name, required in keyword.items()}
    takes = takes._replace(positional=free, keyword=keyword)
    return list(dict.fromkeys(_differences(takes, filled, wanted)))


def _differences(takes: _Parameters, filled: set[str], wanted: _Parameters) -> Iterator[str]:
    """The same, once what is bound has been taken away and fills the parameters ``filled``."""
    count = len(wanted.positional)
    too_many = False
    for at, passed in enumerate(wanted.positional):
        if at < len(takes.positional):
            parameter = takes.positional[at]
            if passed.by_name and not parameter.by_name:
                yield (
                    f"parameter {at + 1} ({parameter.name}) is positional-only, "
                    f"the contract also passes {passed.name} by name"
                )
            elif passed.by_name and parameter.name != passed.name:
                yield (
                    f"parameter {at + 1} is called {parameter.name}, "
                    f"the contract passes {passed.name} by name"
                )
            if parameter.required and not passed.required:
                yield f"requires {parameter.name}, which the contract may leave out"
            if parameter.by_name:
                filled.add(parameter.name)
        elif not takes.var_positional:
            if passed.name in takes.keyword:
                yield _KEYWORD_ONLY.format(passed.name)
            else:
                too_many = True
        elif passed.by_name and (
            passed.name in filled or not (takes.var_keyword or passed.name in takes.keyword)
        ):
            yield f"takes {passed.name} by position only, the contract also passes it by name"
    if too_many:
        names = ", ".join(parameter.name for parameter in wanted.positional)
        yield (
            f"takes {_counted(len(takes.positional))}, but the contract passes {count}: ({names})"
        )

    rest = takes.positional[count:]
    by_name = takes.keyword | {p.name: p.required for p in rest if p.by_name}
    if wanted.var_positional:
        filled.update(parameter.name for parameter in rest if parameter.by_name)
    for name in wanted.keyword:
        if name in filled or not (takes.var_keyword or name in by_name):
            yield f"does not take {name} by name, as the contract passes it"
    by_position = {parameter.name for parameter in wanted.positional}
    for name, required in {**by_name, **{p.name: p.required for p in rest}}.items():
        if not required or (name in by_name and wanted.keyword.get(name)):
            continue
        if name in by_name and name in wanted.keyword:
            yield f"requires {name}, which the contract may leave out"
        elif name in takes.keyword and name in by_position:
            yield _KEYWORD_ONLY.format(name)
        else:
            yield f"requires {name}, which the contract does not pass"
    if wanted.var_positional and not takes.var_positional:
        yield "takes no *args, but the contract passes any number of arguments"
    if wanted.var_keyword and not takes.var_keyword:
        yield "takes no **kwargs, but the contract passes arguments of any name"


def _declares_state(cls: type) -> bool:
    own = _dict_of(cls)
    if cls is object or cls is Generic or own.get("_is_protocol"):
        return False
    # typing itself gives an heir of a Protocol object's own __init__ when it is first made.
    if own.get("__init__", object.__init__) is not object.__init__ or "__new__" in own:
        return True
    return not all(map(_is_class_var, _annotations(cls).values()))


def _has_room_for_state(cls: type) -> bool:
    """Whether an instance has memory for more than a ``__dict__`` and weak references."""
    plain_bytes = object.__basicsize__
    for offset in ("__dictoffset__", "__weakrefoffset__"):
        plain_bytes += _POINTER_BYTES * (type.__dict__[offset].__get__(cls) > 0)
    size_bytes = type.__dict__["__basicsize__"].__get__(cls)
    return bool(size_bytes > plain_bytes or type.__dict__["__itemsize__"].__get__(cls))


def _annotations(cls: type) -> dict[str, Any]:
    annotations = _dict_of(cls).get("__annotations__")
    return annotations if type(annotations) is dict else {}


def _is_class_var(annotation: Any) -> bool:
    if type(annotation) is str:
        return annotation.partition("[")[0].rpartition(".")[2] == "ClassVar"
    return annotation is ClassVar or (
        type(annotation) is _CLASS_VAR and get_origin(annotation) is ClassVar
    )


def _is_abstract(cls: type, name: str) -> bool:
    names = _dict_of(cls).get("__abstractmethods__")
    return type(names) is frozenset and name in names


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_mock(cls: type, name: str = "NonCallableMock") -> bool:
    """Whether it is a class of unittest.mock, which is not imported for that."""
    mock = getattr(sys.modules.get("unittest.mock"), name, None)
    return mock is not None and any(base is mock for base in _mro_of(cls))


def _mocked(cls: type, own: dict[str, Any], name: str) -> Any:
    """What a mock would answer, or a stand-in for what it would make."""
    if not _is_mock(cls) or _is_special(name):
        return _ABSENT
    child = own["_mock_children"].get(name, _ABSENT)
    if child is not _ABSENT:
        if _is_mock(type(child)):
            return child
        return _unknown if _is_mock(type(child), "_SpecState") else _ABSENT
    spec = own["_mock_methods"]
    if own["_mock_sealed"] or (spec is not None and name not in spec):
        return _ABSENT
    if name in own["_spec_asyncs"] or (_is_mock(cls, "AsyncMock") and spec is None):
        return _unknown_async
    return _unknown


def _described(component: Any) -> str:
    cls: type = type(component)
    if issubclass(cls, type):
        return f"the class {_name_of(component)}"
    if issubclass(cls, ModuleType):
        return f"the module {_instance_dict(component).get('__name__')}"
    return str(_name_of(cls))


def _a(cls: type) -> str:
    name = _name_of(cls)
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _counted(count: int) -> str:
    return f"{count} argument{'' if count == 1 else 's'}"
