"""Packages whose public names are loaded when they are first asked for."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class LazyPackage(ModuleType):
    """A package that finds its names in its modules: see `load_lazily`."""

    _HOMES: dict[str, str]
    _EXTRA: str | None

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets each submodule as an attribute: it must not hide the function.
        if name not in self._HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in self._HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(f"{self.__name__}.{self._HOMES[name]}"), name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if self._EXTRA is None or missing in ("", "vmmig"):
                raise
            from vmmig.errors import MissingExtraError

            raise MissingExtraError(missing, extra=self._EXTRA) from error
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *self._HOMES})


def load_lazily(
    package: str, names: Mapping[str, str], *, extra: str | None = None
) -> dict[str, str]:
    """Let a package load its names when they are first asked for.

    Args:
        package: The package's ``__name__``.
        names: Its modules, each with the names that are there, separated by spaces.
        extra: The extra that adds what those modules need; where it is not installed, asking
            for a name raises MissingExtraError.

    Returns:
        The module of each name.

    >>> import vmmig
    >>> vmmig._HOMES["Snapshot"]
    'snapshot'
    """
    homes = {name: module for module, those in names.items() for name in those.split()}
    vars(sys.modules[package]).update(_HOMES=homes, _EXTRA=extra)
    sys.modules[package].__class__ = LazyPackage
    return homes
