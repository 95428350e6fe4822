"""A snapshot's bytes: the container, format 1, and a cattrs converter for snapshots elsewhere.

A container (``.vmsnap``) is one header, one index, the sections, and one table of checksums.
All integers are little-endian; every checksum is the 64-bit XXH3 with seed 0
(https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md).

Header, 96 bytes::

     0   8  magic: 89 56 4D 53 4E 41 50 0A
     8   2  format version: 1
    10   2  flags: features a reader must know; 1: sections are compressed, 2: are detached
    12   4  zero
    16   8  bytes of the index
    24   8  bytes of the whole container
    32   8  checksum of the index
    40  48  writer: UTF-8, filled up with zero bytes
    88   8  checksum of the 88 bytes before

Magic, version, writer and the header's checksum keep their places in every later version.

Index: one msgpack array of ``3 + N + S`` elements for a tree of N nodes and S sections, or
``4 + N + S`` where the flags are not 0::

    bin   N times u32: how many children each node has
    bin   N times u32: how many sections each node has
    bin   S times u64: how many bytes each section has
    bin   only where the flags are not 0: S times u64: how many bytes of each section the
          container has: as many as it has, or for large ones fewer where it is compressed,
          or 2^64-1 where it is detached
    str   N times: each node's id
    str   S times: each section's id

The nodes stand in breadth-first order: the root, its children, their children. The children of
one node, and the sections of one node, stand in the order of their ids' code points. That
determines every byte, so equal trees give equal bytes from offset 96 on, and equal containers
where the writer is the same.

Sections: directly behind the index, those below 64 KiB, one after another in index order. Then
the others in index order, each preceded by zero bytes up to a multiple of 4096 from the
container's start, so that they can be mapped; a compressed one has none before it, and of a
detached one nothing is there.

A compressed section is one Zstandard frame (RFC 8878) with a content checksum, and needs a
window of 8 MiB at most. It ends with the section's last byte in the container.

A detached section's bytes go another way, in the same order: for instance as a descriptor of
the memory that holds them, to another process of the same machine. They have no checksums, for
it is the same memory that both processes see. A flag is set exactly where there is such a
section.

Table: zero bytes up to a multiple of 8, then one u64 checksum for each section below 64 KiB,
in index order, then one for each MiB, begun or whole, of what the container has of each other
section, in index order; last, one checksum of the table's bytes before. It comes last so that
a container is written in one pass, each MiB checked while it is in the processor's cache; its
place follows from the index.
"""

from typing import TYPE_CHECKING

from vmmig._lazy import load_lazily

if TYPE_CHECKING:
    from vmmig.codec.converter import configure_converter as configure_converter
    from vmmig.codec.converter import make_converter as make_converter
    from vmmig.codec.decoding import RangeReader as RangeReader
    from vmmig.codec.decoding import ReadableStream as ReadableStream
    from vmmig.codec.decoding import load as load
    from vmmig.codec.decoding import loads as loads
    from vmmig.codec.decoding import open_ranges as open_ranges
    from vmmig.codec.decoding import read_pieces as read_pieces
    from vmmig.codec.encoding import Encoding as Encoding
    from vmmig.codec.encoding import WritableStream as WritableStream
    from vmmig.codec.encoding import dump as dump
    from vmmig.codec.encoding import dumps as dumps
    from vmmig.codec.encoding import encode as encode
    from vmmig.codec.examination import Damage as Damage
    from vmmig.codec.examination import Examination as Examination
    from vmmig.codec.examination import SectionVerdict as SectionVerdict
    from vmmig.codec.examination import examine as examine
    from vmmig.codec.layout import ALIGNMENT_BYTES as ALIGNMENT_BYTES
    from vmmig.codec.layout import CHUNK_BYTES as CHUNK_BYTES
    from vmmig.codec.layout import FORMAT_VERSION as FORMAT_VERSION
    from vmmig.codec.layout import HEADER_BYTES as HEADER_BYTES
    from vmmig.codec.layout import LARGE_BYTES as LARGE_BYTES
    from vmmig.codec.layout import MAGIC as MAGIC
    from vmmig.codec.layout import Header as Header
    from vmmig.codec.layout import Limits as Limits
    from vmmig.codec.layout import read_header as read_header
    from vmmig.codec.opening import Container as Container
    from vmmig.codec.opening import StoredSection as StoredSection

load_lazily(
    __name__,
    {
        "converter": "configure_converter make_converter",
        "decoding": "RangeReader ReadableStream load loads open_ranges read_pieces",
        "encoding": "Encoding WritableStream dump dumps encode",
        "examination": "Damage Examination SectionVerdict examine",
        "layout": "ALIGNMENT_BYTES CHUNK_BYTES FORMAT_VERSION HEADER_BYTES LARGE_BYTES MAGIC "
        "Header Limits read_header",
        "opening": "Container StoredSection",
    },
)
