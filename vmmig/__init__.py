"""vmmig: pause, snapshot, save, move and restore machines, by duck-typed components."""

__version__ = "0.1.0"
