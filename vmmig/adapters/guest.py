"""The guest that the demo and the tests run: real machine code that computes a SHA-256 chain.

It fills its RAM, hashes it block by block while it changes it, reports on the serial port, and
powers the machine off. The source, with its exact definition, is ``guest.asm`` beside this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from itertools import islice
from pathlib import Path
from struct import pack

from vmmig.errors import MigratableError

ENTRY = 0x1000
"""The guest-physical address at which the code is loaded and entered."""

_BLOCK_BYTES = 1 << 16
_WORDS = _BLOCK_BYTES // 8
_IN_EACH_WORD = int.from_bytes((1).to_bytes(8, "little") * _WORDS, "little")
_DIGESTS = _BLOCK_BYTES // 32


def code() -> bytes:
    """The guest's machine code, to be loaded at `ENTRY`.

    >>> len(code()) < 0xF000
    True
    """
    return Path(__file__).with_name("guest.bin").read_bytes()


def expected_digest(ram_bytes: int, rounds: int) -> str:
    """The digest that the guest prints, computed with hashlib, in hexadecimal.

    Args:
        ram_bytes: The machine's RAM: a multiple of 64 KiB, at least 128 KiB.
        rounds: How often the guest hashes all of it; at least 1.

    Raises:
        MigratableError: The guest does not run with these.

    >>> expected_digest(1 << 17, 1)
    'cd1ecb7a0cbc13a800a22497fbd7db53f5c85b6f7ee629024e42eb3b53af2a8d'
    """
    if ram_bytes % _BLOCK_BYTES or ram_bytes < 2 * _BLOCK_BYTES or rounds < 1:
        raise MigratableError(
            f"the guest needs RAM of a multiple of 64 KiB, at least 128 KiB, and at least one "
            f"round, not {ram_bytes} bytes and {rounds} rounds"
        )
    blocks = _pattern(ram_bytes // _BLOCK_BYTES - 1)
    digest = bytes(32)
    for _ in range(rounds):
        for i, block in enumerate(blocks):
            digest = sha256(digest + block.to_bytes(_BLOCK_BYTES, "little")).digest()
            blocks[i] = block ^ int.from_bytes(digest * _DIGESTS, "little")
    return digest.hex()


def _pattern(n: int) -> list[int]:
    """``n`` blocks of the pattern, each as one little-endian number."""
    random = _xorshift64()
    blocks = [int.from_bytes(pack(f"<{_WORDS}Q", *islice(random, _WORDS)), "little")]
    for value in islice(random, n - 1):
        blocks.append(blocks[-1] ^ value * _IN_EACH_WORD)
    return blocks


def _xorshift64() -> Iterator[int]:
    x = 0x9E3779B97F4A7C15
    while True:
        x ^= x << 13 & 0xFFFFFFFFFFFFFFFF
        x ^= x >> 7
        x ^= x << 17 & 0xFFFFFFFFFFFFFFFF
        yield x
