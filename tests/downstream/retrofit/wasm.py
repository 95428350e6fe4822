"""An instance of a WebAssembly module in wasmtime."""

from __future__ import annotations

import json

from wasmtime import Engine, Global, Instance, Module, Store

from retrofit.still import Still, refusing
from vmmig import RestoreError, Snapshot

_PAGE_BYTES = 0x10000


class Wasm(Still):
    """State is what the module exports: the memory "memory" and all its globals."""

    def __init__(self, engine: Engine, module: Module) -> None:
        self.engine, self.module = engine, module
        self.store = Store(engine)
        self.exports = dict(Instance(self.store, module, []).exports(self.store))

    def call(self, name: str, *args: int) -> object:
        return self.exports[name](self.store, *args)

    def globals(self) -> dict[str, object]:
        exports = self.exports.items()
        return {name: one.value(self.store) for name, one in exports if isinstance(one, Global)}

    def snapshot(self) -> Snapshot:
        memory = self.exports["memory"].read(self.store)
        return self.snapshot_of(memory=memory, globals=json.dumps(self.globals()).encode())

    def restore(self, snapshot: Snapshot) -> None:
        memory, values = snapshot.take("memory", "globals")
        restored = Wasm(
            self.engine, self.module
        )  # memory never shrinks: what has grown too far is replaced
        with refusing():
            pages, rest = divmod(len(memory), _PAGE_BYTES)
            values = json.loads(values)
            if rest or values.keys() != restored.globals().keys():
                raise RestoreError("the memory or the globals are not of this module")
            store, target = restored.store, restored.exports["memory"]
            target.grow(store, pages - target.size(store))
            target.write(store, memory)
            for name, value in values.items():
                restored.exports[name].set_value(store, value)
        self.store, self.exports = restored.store, restored.exports
