"""What a field of a state may hold: a type, how it is checked, and how it stands on the wire.

Nothing is coerced in either direction. What is written is checked as strictly as what is read, so
that nothing is saved that could not be restored.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NewType, Union

import attrs

from vmmig.errors import MigratableError
from vmmig.snapshot import Buffer

Json = dict[str, Any]


class Misfit(Exception):
    """A value does not fit its type; the path grows while the error travels outwards.

    >>> str(Misfit("an int is needed, not str").at("[3]").at(".received"))
    'received[3]: an int is needed, not str'
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.path = ""

    def at(self, step: str) -> Misfit:
        """The same, seen from one step further out."""
        self.path = step + self.path
        return self

    def __str__(self) -> str:
        path = self.path.removeprefix(".")
        return f"{path}: {self.what}" if path else self.what


@attrs.frozen
class Range:
    """Limits of a number, for ``Annotated[int, Range(0, 255)]``; both are allowed.

    >>> Range(0, 255)
    Range(min=0, max=255)
    """

    min: float | None = None
    max: float | None = None


@attrs.frozen
class Length:
    """Limits of a length, for ``Annotated[bytes, Length(max=512)]``; both are allowed.

    >>> Length(max=512)
    Length(min=0, max=512)
    """

    min: int = 0
    max: int | None = None


U8 = Annotated[int, Range(0, (1 << 8) - 1)]
U16 = Annotated[int, Range(0, (1 << 16) - 1)]
U32 = Annotated[int, Range(0, (1 << 32) - 1)]
U64 = Annotated[int, Range(0, (1 << 64) - 1)]
I8 = Annotated[int, Range(-(1 << 7), (1 << 7) - 1)]
I16 = Annotated[int, Range(-(1 << 15), (1 << 15) - 1)]
I32 = Annotated[int, Range(-(1 << 31), (1 << 31) - 1)]
I64 = Annotated[int, Range(-(1 << 63), (1 << 63) - 1)]


@attrs.frozen
class Kind:
    """A field's type, compiled.

    Attributes:
        read: From what stands on the wire to the value; raises a `Misfit`.
        write: From the value to what stands on the wire; raises a `Misfit`.
        json: The type as a schema has it.
        wire: The Python types by which it is told from others in a union.
        test: Where reading and writing only check: the check, as an expression on ``{}``.
        has_buffers: It may hold large bytes, which stand in sections of their own.
    """

    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    json: Json
    wire: frozenset[type]
    test: str | None = None
    has_buffers: bool = False


def kind_of(annotation: Any) -> Kind:
    """The compiled form of a type annotation.

    Raises:
        MigratableError: No state can hold such values; the error says what can be used instead.

    >>> kind_of(U8).json
    {'type': 'int', 'min': 0, 'max': 255}
    >>> kind_of(U8).read(256)
    Traceback (most recent call last):
    vmmig.state.types.Misfit: 256 is not in 0..255
    """
    limits: list[Range | Length] = []
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation, *notes = typing.get_args(annotation)
            limits += [note for note in notes if isinstance(note, Range | Length)]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            break
    kind = _kind(annotation)
    for limit in limits:
        kind = _limited(kind, limit)
    return kind


def _kind(annotation: Any) -> Kind:
    if annotation is None or annotation is type(None):
        return _exactly(type(None), "none")
    if annotation in (int, bool, str, float):
        return _exactly(annotation, annotation.__name__)
    if annotation in (bytes, bytearray, memoryview) or annotation is Buffer:
        return _bytes(annotation)
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return _union([kind_of(arg) for arg in args])
    if origin is Literal:
        return _choice({value: value for value in args}, {"type": "literal", "values": [*args]})
    if origin in (list, Sequence) and args:
        return _list(kind_of(args[0]), list)
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return _list(kind_of(args[0]), tuple)
    if origin is tuple:
        return _tuple([kind_of(arg) for arg in args if arg != ()])
    if origin in (set, frozenset):
        return _set(kind_of(args[0]), origin)
    if origin in (dict, Mapping):
        return _dict(*map(kind_of, args))
    if (origin or annotation).__class__ is type and (
        f"{(origin or annotation).__module__}.{(origin or annotation).__name__}" == "numpy.ndarray"
    ):
        return _array(args)
    if isinstance(annotation, type):
        if issubclass(annotation, enum.Flag):
            return _flags(annotation)
        if issubclass(annotation, enum.Enum):
            members: dict[Any, Any] = {member.value: member for member in annotation}
            named = {name: member.value for name, member in annotation.__members__.items()}
            return _choice(members, {"type": "enum", "members": named})
        if "__vmmig_state__" in vars(annotation):
            nested: Kind = vars(annotation)["__vmmig_state__"].kind
            return nested
        if "__attrs_attrs__" in vars(annotation):
            try:
                return _class(annotation)
            except RecursionError as error:
                raise MigratableError(f"{_name(annotation)} contains itself") from error
    raise MigratableError(
        f"a state cannot hold {_name(annotation)}: what it may be could not be checked. It can "
        "hold int, bool, str, float, bytes, bytearray, memoryview, Buffer, None, enums, Literal, "
        "list, tuple, set, dict, numpy arrays, attrs classes and unions of these"
    )


def fields_of(cls: type[Any], hints: Mapping[str, Any]) -> dict[str, tuple[str, Kind]]:
    """The fields of an attrs class in wire order: their names, attributes and kinds.

    >>> Point = attrs.make_class("Point", {"y": attrs.field(), "x": attrs.field()})
    >>> list(fields_of(Point, {"x": int, "y": int}))
    ['x', 'y']
    """
    found = {}
    for attribute in attrs.fields(cls):
        name = attribute.alias or attribute.name
        if not attribute.init:
            raise MigratableError(
                f"{_name(cls)}.{attribute.name} is not set by __init__, so that it could not be "
                "restored: use init=True, or make it a property"
            )
        annotation = hints.get(attribute.name)
        if annotation is None and attribute.name not in hints:
            raise MigratableError(f"{_name(cls)}.{attribute.name} has no type")
        if attribute.metadata.get("vmmig.subsection"):
            continue
        try:
            found[name] = attribute.name, kind_of(annotation)
        except MigratableError as error:
            raise MigratableError(f"{_name(cls)}.{attribute.name}: {error.cause}") from error
    return dict(sorted(found.items()))


def hints_of(cls: type[Any], names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The annotations of a class, resolved.

    >>> hints_of(attrs.make_class("Point", {"x": attrs.field(type=int)}))
    {'x': <class 'int'>}
    """
    try:
        hints = typing.get_type_hints(cls, localns=dict(names or {}), include_extras=True)
        attrs.resolve_types(cls, localns=dict(names or {}), include_extras=True)
    except NameError as error:
        raise MigratableError(
            f"the types of {_name(cls)} cannot be resolved: {error}; define them before it"
        ) from error
    for attribute in attrs.fields(cls):
        if attribute.type is not None and not isinstance(attribute.type, str):
            hints.setdefault(attribute.name, attribute.type)
    return hints


def compile_fields(
    cls: type[Any], fields: Mapping[str, tuple[str, Kind]], *, subsections: bool = False
) -> tuple[Callable[..., Any], Callable[[Any], dict[str, Any]]]:
    """A reader from a dict of fields to the class, and a writer back, as one function each.

    With ``subsections`` the reader takes a second dict: arguments for the constructor.

    >>> Point = attrs.make_class("Point", {"x": attrs.field(type=int)})
    >>> read, write = compile_fields(Point, fields_of(Point, {"x": int}))
    >>> read({"x": 1}), write(Point(2))
    (Point(x=1), {'x': 2})
    """
    scope: dict[str, Any] = {
        "cls": cls,
        "names": frozenset(fields),
        "Misfit": Misfit,
        "no_dict": _no_dict,
        "refused": _refused,
        "no_object": _no_object,
    }
    reader = [f"def read(fields{', others' if subsections else ''}):"]
    reader += [f" if type(fields) is not dict or len(fields) != {len(fields)}:"]
    reader += ["  no_dict(fields, names)"]
    writer = ["def write(value):", " if type(value) is not cls: no_object(value, cls)"]
    arguments: dict[str, str] = {}
    entries = []
    reader += [" try:", "  pass"] + [f"  v{i} = fields[{n!r}]" for i, n in enumerate(fields)]
    reader += [" except KeyError:", "  no_dict(fields, names)"]
    for i, (name, (member, kind)) in enumerate(fields.items()):
        scope |= {f"read{i}": kind.read, f"write{i}": kind.write}
        arguments[name] = f"v{i}"
        entries.append(f"{name!r}: v{i}")
        writer.append(f" v{i} = value.{member}")
        for lines, action in ((reader, f"read{i}(v{i})"), (writer, f"write{i}(v{i})")):
            if kind.test is not None:
                lines.append(f" if not ({kind.test.replace('{}', f'v{i}')}):")
            else:
                lines.append(" if True:")
            result = "" if kind.test is not None else f"v{i} = "
            lines.append(f"  try: {result}{action}")
            lines.append(f"  except Misfit as misfit: raise misfit.at({'.' + name!r})")
    given, by_name = [], False
    for attribute in attrs.fields(cls):
        name = attribute.alias or attribute.name
        by_name |= attribute.kw_only or name not in arguments
        if name in arguments:
            given.append(f"{name}={arguments[name]}" if by_name else arguments[name])
    given += ["**others"] * subsections
    reader += [" try:", f"  return cls({', '.join(given)})"]
    reader += [" except Exception as error:", "  raise refused(error) from error"]
    writer.append(f" return {{{', '.join(entries)}}}")
    exec("\n".join([*reader, *writer]), scope)
    return scope["read"], scope["write"]


def shown(value: object) -> str:
    """A value as an error shows it: short, whatever it is.

    >>> shown("x" * 100), shown(1 << 100000)
    ("'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...", 'an int of 100001 bits')
    """
    if type(value) is int and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[:50]
    elif not isinstance(value, int | float | None):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 43 else f"{text[:40]}..."


def _name(thing: object) -> str:
    return thing.__qualname__ if isinstance(thing, type) else str(thing)


def _kind_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _needed(what: str, value: object) -> Misfit:
    article = "" if what == "None" else "an " if what[0] in "aeiou" else "a "
    return Misfit(f"{article}{what} is needed, not {_kind_name(value)}")


def _no_dict(fields: Any, names: frozenset[str]) -> None:
    if type(fields) is not dict:
        raise _needed("map of fields", fields)
    missing, unknown = sorted(names - fields.keys()), [*map(shown, fields.keys() - names)]
    if missing:
        raise Misfit("is missing").at(f".{missing[0]}")
    raise Misfit(f"there is no such field: {', '.join(sorted(unknown)[:3])}")


def _no_object(value: object, cls: type[Any]) -> None:
    raise _needed(_name(cls), value)


def _refused(error: Exception) -> Exception:
    if isinstance(error, Misfit):
        return error
    cause = error.cause if isinstance(error, MigratableError) else error
    return Misfit(f"its class refuses it: {cause}")


def _exactly(cls: type[Any], name: str) -> Kind:
    label = "None" if name == "none" else name

    def check(value: Any) -> Any:
        if type(value) is not cls:
            raise _needed(label, value)
        return value

    test = "{} is None" if name == "none" else f"type({{}}) is {name}"
    return Kind(check, check, {"type": name}, frozenset([cls]), test)


def _bytes(annotation: Any) -> Kind:
    def read(value: Any) -> Any:
        if type(value) is not bytes and type(value) is not memoryview:
            raise _needed("bytes", value)
        if annotation is Buffer:
            return value
        return value if type(value) is annotation else annotation(value)

    def write(value: Any) -> Any:
        if annotation is not Buffer and type(value) is not annotation:
            raise _needed(annotation.__name__, value)
        if type(value) is bytes:
            return value
        try:
            view = memoryview(value)
        except TypeError:
            raise _needed("bytes-like object", value) from None
        if not view.c_contiguous:
            raise Misfit("its bytes are not contiguous")
        return view.cast("B") if view.nbytes else b""

    json = {"type": "bytes"}
    return Kind(read, write, json, frozenset([bytes, memoryview]), has_buffers=True)


def _limited(kind: Kind, limit: Range | Length) -> Kind:
    numbers = kind.json["type"] in ("int", "float")
    sized = kind.json["type"] in ("str", "bytes", "list", "set", "dict")
    if isinstance(limit, Range) != numbers or not (numbers or sized):
        raise MigratableError(f"{limit!r} does not fit a value of type {kind.json['type']}")
    bounds = ("min", "max") if numbers else ("min_length", "max_length")
    before = [kind.json.get(name) for name in bounds]
    given = [None if bound in (math.inf, -math.inf) else bound for bound in (limit.min, limit.max)]
    low = max((bound for bound in (before[0], given[0]) if bound is not None), default=None)
    high = min((bound for bound in (before[1], given[1]) if bound is not None), default=None)
    if isinstance(limit, Range):
        json = {**kind.json, "min": low, "max": high}
        measure, what = "{}", ""
    else:
        json = {**kind.json, "min_length": low or None, "max_length": high}
        measure, what = "len({})", "a length of "
    json = {key: value for key, value in json.items() if value is not None}
    checks = [f"{low!r} <= {measure}"] * (low is not None)
    checks += [f"{measure} <= {high!r}"] * (high is not None)
    test = " and ".join(checks) or "True"
    if low is not None and high is not None:
        test = f"{low!r} <= {measure} <= {high!r}"
    fits: Any = eval(f"lambda value: {test.replace('{}', 'value')}")
    allowed = f"{'' if low is None else low}..{'' if high is None else high}"

    def limited(inner: Callable[[Any], Any], of_result: bool) -> Callable[[Any], Any]:
        def check(value: Any) -> Any:
            result = inner(value)
            counted = result if of_result else value
            if not fits(counted):
                found = f"{what}{len(counted)}" if what else shown(counted)
                raise Misfit(f"{found} is not in {allowed}")
            return result

        return check

    return attrs.evolve(
        kind,
        read=limited(kind.read, False),
        write=limited(kind.write, True),
        json=json,
        test=None if kind.test is None else f"{kind.test} and {test}",
    )


def _union(kinds: list[Kind]) -> Kind:
    options = [option for kind in kinds for option in kind.json.get("of", [kind.json])]
    by_type: dict[type, Kind] = {}
    for kind in kinds:
        for cls in kind.wire:
            if cls in by_type and by_type[cls] is not kind:
                raise MigratableError(
                    f"a union of {by_type[cls].json['type']} and {kind.json['type']} cannot be "
                    "told apart when it is read: give them a field that says which it is"
                )
            by_type[cls] = kind
    names = " or ".join(option["type"] for option in options)

    def read(value: Any) -> Any:
        kind = by_type.get(type(value))
        if kind is None:
            raise _needed(names, value)
        return kind.read(value)

    def write(value: Any) -> Any:
        first: Misfit | None = None
        for kind in kinds:
            try:
                return kind.write(value)
            except Misfit as misfit:
                if first is None or misfit.path or misfit.__cause__:
                    first = misfit
        if first is not None and (first.path or first.__cause__):
            raise first
        direct = by_type.get(type(value))
        if direct is not None:
            direct.write(value)
        raise _needed(names, value)

    return Kind(
        read,
        write,
        {"type": "union", "of": sorted(options, key=repr)},
        frozenset(by_type),
        has_buffers=any(kind.has_buffers for kind in kinds),
    )


def _choice(members: dict[Any, Any], json: Json) -> Kind:
    """An enum or a literal: each of a few ints or strings stands for a member."""
    if not members or {type(value) for value in members} - {int, str}:
        raise MigratableError("the values of an enum or Literal in a state must be int or str")
    names = ", ".join(map(repr, list(members)[:8])) + (", ..." if len(members) > 8 else "")
    wire = {type(value) for value in members}
    values = {id(member): value for value, member in members.items()}
    is_enum = json["type"] == "enum"

    def read(value: Any) -> Any:
        if type(value) not in wire:
            raise _needed(" or ".join(sorted(cls.__name__ for cls in wire)), value)
        try:
            return members[value]
        except KeyError:
            raise Misfit(f"{shown(value)} is none of {names}") from None

    def write(value: Any) -> Any:
        if is_enum:
            if id(value) not in values:
                raise Misfit(f"{shown(value)} is no member of the enum, of {names}")
            return values[id(value)]
        return read(value)

    return Kind(read, write, json, frozenset(wire))


def _flags(cls: type[enum.Flag]) -> Kind:
    mask = 0
    for member in cls.__members__.values():
        mask |= member.value

    def read(value: Any) -> Any:
        if type(value) is not int:
            raise _needed("int", value)
        if value < 0 or value & ~mask:
            raise Misfit(f"{shown(value)} has flags that are not in {mask:#x}")
        return cls(value)

    def write(value: Any) -> Any:
        if type(value) is not cls:
            raise _needed(cls.__name__, value)
        read(value.value)
        return value.value

    members = {name: member.value for name, member in cls.__members__.items()}
    return Kind(read, write, {"type": "flags", "members": members}, frozenset([int]))


_ARRAYS: dict[tuple[Any, Any], str] = {
    (bounds[code == code.lower()]): code
    for size, codes in ((8, "Bb"), (16, "Hh"), (32, "Ii"), (64, "Qq"))
    for code in codes
    for bounds in [((0, (1 << size) - 1), (-(1 << size - 1), (1 << size - 1) - 1))]
}


def _each(one: Callable[[Any], Any], kind: Kind) -> Callable[[Any], list[Any]]:
    """A function that converts each item; where only a check is needed, it is made in C."""
    name, low, high = kind.json["type"], kind.json.get("min"), kind.json.get("max")
    plain = {"int": int, "str": str, "bool": bool, "float": float}.get(name)
    code = _ARRAYS.get((low, high))
    is_bounded = low is not None or high is not None
    checks_only = plain is not None and kind.json.keys() <= {"type", "min", "max"}
    quick = checks_only and (not is_bounded or (name == "int" and code is not None))
    only = {plain}

    def each(items: list[Any]) -> list[Any]:
        if quick and {*map(type, items)} <= only:
            if code is None:
                return items
            try:
                array(code, items)
            except OverflowError:
                pass
            else:
                return items
        done: list[Any] = []
        try:
            for item in items:
                done.append(one(item))
        except Misfit as misfit:
            misfit.at(f"[{len(done)}]")
            raise
        return done

    return each


def _list(item: Kind, cls: type[Any]) -> Kind:
    read_each, write_each = _each(item.read, item), _each(item.write, item)

    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _needed("list", value)
        return read_each(value) if cls is list else cls(read_each(value))

    def write(value: Any) -> Any:
        if type(value) is not cls:
            raise _needed(cls.__name__, value)
        return write_each([*value])

    json = {"type": "list", "items": item.json}
    return Kind(read, write, json, frozenset([list]), has_buffers=item.has_buffers)


def _tuple(items: list[Kind]) -> Kind:
    def convert(value: Any, cls: type[Any], functions: list[Callable[[Any], Any]]) -> list[Any]:
        if type(value) is not cls:
            raise _needed(cls.__name__, value)
        if len(value) != len(items):
            raise Misfit(f"{len(items)} items are needed, not {len(value)}")
        done: list[Any] = []
        try:
            for function, item in zip(functions, value, strict=True):
                done.append(function(item))
        except Misfit as misfit:
            misfit.at(f"[{len(done)}]")
            raise
        return done

    readers, writers = [kind.read for kind in items], [kind.write for kind in items]
    return Kind(
        lambda value: tuple(convert(value, list, readers)),
        lambda value: convert(value, tuple, writers),
        {"type": "tuple", "items": [kind.json for kind in items]},
        frozenset([list]),
        has_buffers=any(kind.has_buffers for kind in items),
    )


def _order(value: Any) -> tuple[str, Any]:
    return type(value).__name__, value


def _require_scalar(kind: Kind, what: str) -> None:
    if kind.json["type"] not in ("int", "str", "bool", "bytes", "enum", "literal", "flags"):
        raise MigratableError(f"{what} must be int, str, bool, bytes or an enum")


def _set(item: Kind, cls: type[Any]) -> Kind:
    _require_scalar(item, "what a set holds")
    read_each, write_each = _each(item.read, item), _each(item.write, item)

    def read(value: Any) -> Any:
        if type(value) is not list:
            raise _needed("list", value)
        found = cls(read_each(value))
        if len(found) != len(value):
            raise Misfit("it has an item twice")
        return found

    def write(value: Any) -> Any:
        if type(value) is not cls:
            raise _needed(cls.__name__, value)
        return sorted(write_each(value), key=_order)

    return Kind(read, write, {"type": "set", "items": item.json}, frozenset([list]))


def _dict(key: Kind, value: Kind) -> Kind:
    _require_scalar(key, "a dict's keys")

    def convert(
        items: Any, one_key: Callable[[Any], Any], one_value: Callable[[Any], Any]
    ) -> list[tuple[Any, Any]]:
        if type(items) is not dict:
            raise _needed("dict", items)
        done = []
        for k, v in items.items():
            try:
                done.append((one_key(k), one_value(v)))
            except Misfit as misfit:
                misfit.at(f"[{shown(k)}]")
                raise
        return done

    def read(items: Any) -> Any:
        return dict(convert(items, key.read, value.read))

    def write(items: Any) -> Any:
        done = convert(items, key.write, value.write)
        return dict(sorted(done, key=lambda item: _order(item[0])))

    return Kind(
        read,
        write,
        {"type": "dict", "keys": key.json, "values": value.json},
        frozenset([dict]),
        has_buffers=value.has_buffers,
    )


def _array(args: tuple[Any, ...]) -> Kind:
    import numpy

    # np.ndarray[shape, dtype[T]]; NDArray[Any] leaves the dtype open.
    inner: Any = typing.get_args(args[1]) if len(args) == 2 else ()
    is_open = not inner or inner[0] is Any or not isinstance(inner[0], type)
    try:
        dtype = None if is_open else numpy.dtype(inner[0])
        if dtype is not None and dtype.kind not in "biufc":
            raise TypeError("it is not one of numbers")
    except (TypeError, DeprecationWarning) as error:
        raise MigratableError(f"a state cannot hold arrays of {inner[0]}: {error}") from error

    def check(value: Any) -> Any:
        if type(value) is not numpy.ndarray:
            raise _needed("numpy array", value)
        if value.dtype.kind not in "biufc":
            raise Misfit(f"an array of {value.dtype} cannot be in a state, only one of numbers")
        if dtype is not None and value.dtype != dtype:
            raise Misfit(f"an array of {dtype} is needed, not of {value.dtype}")
        return value

    def write(value: Any) -> Any:
        return numpy.ascontiguousarray(check(value)).reshape(value.shape)

    json: Json = {"type": "array"} | ({"dtype": dtype.str} if dtype is not None else {})
    return Kind(check, write, json, frozenset([numpy.ndarray]), has_buffers=True)


def _class(cls: type[Any]) -> Kind:
    fields = fields_of(cls, hints_of(cls))
    read, write = compile_fields(cls, fields)
    return Kind(
        read,
        write,
        {"type": "class", "fields": {name: kind.json for name, (_, kind) in fields.items()}},
        frozenset([dict]),
        has_buffers=any(kind.has_buffers for _, kind in fields.values()),
    )
