"""The kernel's FUSE interface: one `Codec` per record and one int per constant, taken from the C text by cffi.

`uapi.getattr_in`, `uapi.entry_out`, `uapi.init_in` … are codecs, named as in <linux/fuse.h> without `fuse_`;
`uapi.FUSE_LOOKUP`, `uapi.FATTR_SIZE` … are plain ints. Each is made when it is first asked for, and kept: a process
uses half of the hundred records and three hundred constants. `uapi.iomap("G7")` gives the same for one generation of
the iomap extension.

U1  what cffi computes from the text is the only source of offsets and sizes.
U2  pycparser is not imported as long as fusewire/_uapi.py, generated at installation, has the digest of the text.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final

from fusewire import uapi_text
from fusewire.uapi_iomap import GENERATION_TEXTS

Value = int | bytes

RESERVED: Final = ("padding", "dummy", "unused", "spare", "__spare", "reserved", "__reserved", "s_pad", "zero")
"""Fields so named, with or without a digit behind, carry nothing: the kernel ignores or zeroes them."""

SIGNED: Final = frozenset({"atime", "mtime", "ctime"})
"""64-bit fields that the header calls unsigned and the kernel reads as signed: seconds before 1970 are negative."""

_BYTES: Final = frozenset({"char", "uint8_t", "unsigned char"})

_INTEGERS: Final = {
    "uint64_t": "Q", "int64_t": "q", "uint32_t": "I", "int32_t": "i", "uint16_t": "H", "uint8_t": "B",
}  # fmt: skip


class Codec:
    """The byte layout of one record.

    Attributes:
        size: bytes of the record, without a variable part at its end (`dirent.name`).
        struct: its fields in order. Reserved fields are padding: skipped by unpack, zero in what pack makes. Of a union
            only the first member is there.
        fields: their names; of a record inside the record, as in `attr.ino`.
        offsets: byte offset of each field, and of the other members of unions.
        unpack: `struct.unpack_from`.
    """

    __slots__ = ("fields", "name", "offsets", "size", "struct", "unpack")

    def __init__(self, name: str, size: int, fields: list[tuple[str, int, str]]) -> None:
        """Lay out `fields`, each its name, byte offset and struct format, in the order of the declaration."""
        self.name = name
        self.size = size
        disjoint = _without_overlap(fields)
        self.fields = tuple(field for field, _, _ in disjoint)
        self.offsets = {field: offset for field, offset, _ in fields}
        self.struct = struct.Struct(_format_of(size, disjoint))
        self.unpack: Callable[..., tuple[Any, ...]] = self.struct.unpack_from

    def __repr__(self) -> str:
        return f"<Codec {self.name}: {self.size} bytes>"

    def encode(self, **values: Value) -> bytes:
        """The record with these fields, every other zero. For an inner record's field: `**{"attr.ino": 5}`."""
        unknown = values.keys() - set(self.fields)
        if unknown:
            raise TypeError(f"{self.name} has no field {', '.join(sorted(unknown))}")
        empty = self.unpack(bytes(self.size))
        return self.struct.pack(*(values.get(field, zero) for field, zero in zip(self.fields, empty, strict=True)))

    def decode(self, data: bytes | bytearray | memoryview, offset: int = 0) -> dict[str, Value]:
        """The fields by name. Raises struct.error if `data` is too short. Requests are decoded by `unpack`."""
        return dict(zip(self.fields, self.unpack(data, offset), strict=True))


def _without_overlap(fields: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """The fields that start after the end of those before: the first members of unions."""
    kept: list[tuple[str, int, str]] = []
    end = 0
    for field in fields:
        if field[1] >= end:
            kept.append(field)
            end = field[1] + struct.calcsize("=" + field[2])
    return kept


def _format_of(size: int, fields: list[tuple[str, int, str]]) -> str:
    """The struct format with every gap made explicit, in the byte order of the machine."""
    parts = ["="]
    position = 0
    for _, offset, code in fields:
        if offset > position:
            parts.append(f"{offset - position}x")
        parts.append(code)
        position = offset + struct.calcsize("=" + code)
    if size > position:
        parts.append(f"{size - position}x")
    return "".join(parts)


def _load_ffi() -> Any:
    """The declarations: from the generated module if it is there and up to date, else parsed now (30 ms)."""
    try:
        from fusewire import _uapi  # noqa: PLC0415 - it may not exist

        if _uapi.ffi.integer_const("FUSEWIRE_DIGEST") == uapi_text.DIGEST:
            return _uapi.ffi
    except (ImportError, AttributeError):
        pass  # a checkout that was never built, or an older shape of the generated module
    from cffi import FFI  # noqa: PLC0415 - pulls in pycparser, see U2

    parsed = FFI()
    parsed.cdef(uapi_text.TEXT)
    return parsed


_ffi = _load_ffi()
# Only the generated module refuses a struct that was not declared; parsed in-line, any struct may be named.
_NO_SUCH_TYPE: tuple[type[Exception], ...] = (_ffi.error,) if hasattr(_ffi, "error") else ()


def _integer_constant(name: str) -> int | None:
    """The value of an enumerator, or None if nothing is called so."""
    try:
        if hasattr(_ffi, "integer_const"):
            return int(_ffi.integer_const(name))
        return int(getattr(_parsed_library(), name))
    except AttributeError:
        return None


def _parsed_library() -> Any:
    """The handle through which an FFI that was parsed in-line gives its constants."""
    library = globals().get("_library")
    if library is None:
        library = globals()["_library"] = _ffi.dlopen(None)
    return library


def _is_reserved(name: str) -> bool:
    return name.rstrip("0123456789") in RESERVED


def _leaves(ctype: Any, prefix: str, base: int) -> list[tuple[str, int, str]]:
    """Name, offset and struct format of every field that carries something, inner records opened."""
    found: list[tuple[str, int, str]] = []
    for name, field in ctype.fields:  # the members of an anonymous union are among these, at the same offset
        if _is_reserved(name) or _is_flexible(field.type):
            continue
        path, offset = prefix + name, base + field.offset
        if field.type.kind == "struct":
            found += _leaves(field.type, path + ".", offset)
        else:
            found.append((path, offset, _code_of(name, field.type)))
    return found


def _is_flexible(ctype: Any) -> bool:
    """Whether this is the array without a length at the end of a record."""
    return ctype.kind == "array" and ctype.length is None


def _code_of(name: str, ctype: Any) -> str:
    """The struct format of a field: an integer, or an array of bytes."""
    if ctype.kind == "array":
        if ctype.item.cname not in _BYTES:
            raise TypeError(f"{name}: no codec for {ctype.cname}")
        return f"{ctype.length}s"
    return "q" if name in SIGNED else _INTEGERS[ctype.cname]


def _find(name: str, suffix: str) -> Codec | int | None:
    """The codec or constant of this name among the names with this suffix."""
    if name.isupper():
        return _integer_constant(name + suffix)
    tag = name if name.startswith("cuse_") else f"fuse_{name}"
    try:
        ctype = _ffi.typeof(f"struct {tag}{suffix}")
    except _NO_SUCH_TYPE:
        return None
    if ctype.fields is None:  # parsed in-line, any struct may be named; this one was never declared
        return None
    return Codec(name, _ffi.sizeof(ctype), _leaves(ctype, "", 0))


def __getattr__(name: str) -> Any:
    """A codec or constant at its first use; from then on it is an ordinary attribute of this module."""
    found = None if name.startswith("__") else _find(name, "")
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


class Generation:
    """The iomap extension as one generation of kernels has it; attributes as in the module, `FUSE_IOMAP_BEGIN`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, name: str) -> Any:
        found = None if name.startswith("__") else _find(name, f"_{self.name}")
        if found is None:
            raise AttributeError(f"generation {self.name} of the iomap extension has no {name!r}")
        setattr(self, name, found)
        return found


_generations: Final = {name: Generation(name) for name in GENERATION_TEXTS}


def iomap(generation: str) -> Generation:
    """The layouts and numbers of "G6", "G7" or "GL". Raises KeyError for any other name."""
    return _generations[generation]


def enumerators(enum: str) -> dict[int, str]:
    """Value → name, for logs: "fuse_opcode", "fuse_notify_code", "fuse_init_flag" and whatever else has a name."""
    return dict(_ffi.typeof(f"enum {enum}").elements)
