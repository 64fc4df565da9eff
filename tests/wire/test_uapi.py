"""The declarations against the system's own <linux/fuse.h>, and the codecs made from them."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusewire import uapi, uapi_text
from fusewire.uapi_iomap import GENERATION_TEXTS

HEADER = Path("/usr/include/linux/fuse.h")
PROJECT = Path(uapi.__file__).parent.parent

COMPUTED = {
    "FUSE_NAME_OFFSET": "an offset, not a number of the protocol",
    "FUSE_NAME_OFFSET_DIRENTPLUS": "likewise",
    "FUSE_REMOVEMAPPING_MAX_ENTRY": "depends on the page size",
    "FUSE_NOTIFY_CODE_MAX": "the number of codes known to that header, gone since 7.45",
    "FUSE_KERNEL_MINOR_VERSION": "the version of that header",
}
"""Names of the header that are not compared, each with its reason."""

BECAME_SOMETHING = {("fuse_open_out", "padding"), ("fuse_init_out", "unused")}
"""Reserved fields of older headers that have a meaning in 7.46."""


class Header:
    """What the installed header declares."""

    def __init__(self, text: str) -> None:
        plain = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        self.structs = {
            name: [field for declaration in body.split(";") for field in self._names(declaration)]
            for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", plain, re.DOTALL | re.MULTILINE)
        }
        macros = re.findall(r"^#define\s+((?:FUSE|CUSE|FATTR|FOPEN)_\w+)\s+\S", plain, re.MULTILINE)
        enums = re.findall(r"enum \w+ \{(.*?)\}", plain, re.DOTALL)
        enumerators = [word for body in enums for word in re.findall(r"\b([A-Z]\w+)\b\s*(?:=[^,]*)?(?:,|$)", body)]
        self.constants = [n for n in macros + enumerators if n not in COMPUTED and "_DEV_IOC_" not in n]
        version = re.search(r"FUSE_KERNEL_MINOR_VERSION (\d+)", plain)
        assert version is not None
        self.minor = int(version[1])

    @staticmethod
    def _names(declaration: str) -> list[str]:
        """The names of one declaration, "[]" kept on a flexible array."""
        return [f"{name}[]" if array == "[]" else name for name, array in re.findall(
            r"(\w+)\s*(\[\w*\])?\s*(?:,|$)", declaration.strip())]  # fmt: skip

    def program(self) -> str:
        """C that prints every size, offset and value."""
        lines = ["#include <stddef.h>", "#include <stdio.h>", "#include <linux/fuse.h>", "int main(void) {"]
        for struct, fields in self.structs.items():
            lines.append(f'printf("S {struct} %zu\\n", sizeof(struct {struct}));')
            for field in fields:
                name = field.removesuffix("[]")
                size = "(size_t)0" if field.endswith("[]") else f"sizeof(((struct {struct} *)0)->{name})"
                lines.append(f'printf("F {struct} {name} %zu %zu\\n", offsetof(struct {struct}, {name}), {size});')
        lines += [f'printf("C {name} %lld\\n", (long long)({name}));' for name in self.constants]
        return "\n".join([*lines, "return 0; }"])


@pytest.fixture(scope="module")
def header() -> Header:
    assert HEADER.exists(), "install linux-libc-dev"
    return Header(HEADER.read_text())


@pytest.fixture(scope="module")
def facts(header: Header, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Lines that the compiled program prints, split into words."""
    folder = tmp_path_factory.mktemp("uapi")
    (folder / "facts.c").write_text(header.program())
    subprocess.run(["gcc", "-w", "-o", folder / "facts", folder / "facts.c"], check=True)
    printed = subprocess.run([folder / "facts"], check=True, capture_output=True, text=True).stdout
    return [line.split() for line in printed.splitlines()]


def _field(struct: str, name: str) -> tuple[int, int] | None:
    """Offset and size of a field as cffi computes them, 0 for a flexible array; None if there is none."""
    found = dict(uapi._ffi.typeof(f"struct {struct}").fields).get(name)
    if found is None:
        return None
    flexible = found.type.kind == "array" and found.type.length is None
    return found.offset, 0 if flexible else uapi._ffi.sizeof(found.type)


def test_structs_have_the_systems_sizes(header: Header, facts: list[list[str]]) -> None:
    sizes = {name: int(size) for kind, name, *rest in facts if kind == "S" for size in rest}
    known = {name: size for name, size in sizes.items() if _codec_of(name) is not None}
    assert len(known) > 50
    assert {name: _codec_of(name).size for name in known} == known
    if header.minor <= uapi.FUSE_KERNEL_MINOR_VERSION:
        assert known == sizes, "a struct of the header is not declared"


def _codec_of(struct: str) -> Any:
    return getattr(uapi, struct if struct.startswith("cuse_") else struct.removeprefix("fuse_"), None)


def test_fields_stand_where_the_system_has_them(facts: list[list[str]]) -> None:
    rows = [(row[1], row[2], int(row[3]), int(row[4])) for row in facts if row[0] == "F"]
    expected = {(s, f): (o, n) for s, f, o, n in rows if _codec_of(s) is not None and (s, f) not in BECAME_SOMETHING}
    assert len(expected) > 250
    assert {key: _field(*key) for key in expected} == expected


def test_codecs_find_fields_where_the_system_has_them(facts: list[list[str]]) -> None:
    """The derived struct formats, not only what cffi says: each field alone at all ones lies at its bytes."""
    compared = 0
    for row in facts:
        codec = _codec_of(row[1]) if row[0] == "F" else None
        if codec is None or row[2] not in codec.fields or b"" in codec.unpack(bytes(codec.size)):
            continue
        offset, size = int(row[3]), int(row[4])
        marked = bytearray(codec.size)
        marked[offset : offset + size] = b"\xff" * size
        values = codec.decode(bytes(marked))
        assert values.pop(row[2]) in (-1, (1 << 8 * size) - 1, b"\xff" * size), (codec, row)
        assert not any(value for value in values.values() if not isinstance(value, bytes)), (codec, row)
        compared += 1
    assert compared > 200


def test_constants_have_the_systems_values(header: Header, facts: list[list[str]]) -> None:
    values = {row[1]: int(row[2]) for row in facts if row[0] == "C"}
    known = {name: value for name, value in values.items() if hasattr(uapi, name)}
    assert len(known) > 150
    ours = {name: getattr(uapi, name) for name in known}
    # An int with bit 31 set is negative in C: FUSE_INIT_RESERVED.
    assert ours == {name: value & 0xFFFFFFFF if value < 0 else value for name, value in known.items()}
    if header.minor <= uapi.FUSE_KERNEL_MINOR_VERSION:
        assert known == values, "a constant of the header is not declared"


@pytest.mark.parametrize(
    ("name", "size", "offsets"),
    [
        ("statx_in", 24, {"getattr_flags": 0, "fh": 8, "sx_flags": 16, "sx_mask": 20}),
        ("statx_out", 288, {"attr_valid": 0, "attr_valid_nsec": 8, "flags": 12, "stat.mask": 32}),
        ("statx", 256, {"mode": 28, "ino": 32, "size": 40, "blocks": 48, "attributes_mask": 56, "atime.tv_sec": 64,
                        "btime.tv_sec": 80, "ctime.tv_nsec": 104, "mtime.tv_sec": 112, "rdev_major": 128,
                        "dev_minor": 140}),
        ("init_out", 64, {"max_background": 16, "congestion_threshold": 18, "max_write": 20, "time_gran": 24,
                          "max_pages": 28, "map_alignment": 30, "flags2": 32, "max_stack_depth": 36,
                          "request_timeout": 40}),
        ("init_in", 64, {"flags": 12, "flags2": 16}),
        ("open_out", 16, {"backing_id": 12}),
        ("backing_map", 16, {"fd": 0, "flags": 4}),
        ("copy_file_range_out", 8, {"bytes_copied": 0}),
        ("supp_groups", 4, {"nr_groups": 0}),
        ("notify_prune_out", 16, {"count": 0}),
        ("uring_ent_in_out", 32, {"flags": 0, "commit_id": 8, "payload_sz": 16, "offset": 20}),
        ("uring_req_header", 288, {"in_out": 0, "op_in": 128, "ring_ent_in_out.flags": 256}),
        ("uring_cmd_req", 40, {"flags": 0, "commit_id": 8, "qid": 16, "bufpool.uaddr": 24, "bufpool.len": 32,
                               "ent_zero_copy_buf_index": 24}),
    ],
)  # fmt: skip
def test_newer_structs_match_the_notes(name: str, size: int, offsets: dict[str, int]) -> None:
    """7.39 to 7.46, which the installed header may not have."""
    codec = getattr(uapi, name)
    assert codec.size == size == codec.struct.size
    assert {field: codec.offsets[field] for field in offsets} == offsets


def test_newer_constants_match_the_notes() -> None:
    bits = {
        "CREATE_SUPP_GROUP": 34, "HAS_EXPIRE_ONLY": 35, "DIRECT_IO_ALLOW_MMAP": 36, "PASSTHROUGH": 37,
        "NO_EXPORT_SUPPORT": 38, "HAS_RESEND": 39, "ALLOW_IDMAP": 40, "OVER_IO_URING": 41, "REQUEST_TIMEOUT": 42,
        "HAS_IO_URING_BUFPOOL": 43,
    }  # fmt: skip
    assert {name: getattr(uapi, f"FUSE_{name}") for name in bits} == {name: 1 << bit for name, bit in bits.items()}
    assert (uapi.FUSE_STATX, uapi.FUSE_COPY_FILE_RANGE_64) == (52, 53)
    assert (uapi.FUSE_NOTIFY_RESEND, uapi.FUSE_NOTIFY_INC_EPOCH, uapi.FUSE_NOTIFY_PRUNE) == (7, 8, 9)
    assert (uapi.FOPEN_PASSTHROUGH, uapi.FOPEN_IO_URING_ZERO_COPY) == (1 << 7, 1 << 8)
    assert uapi.FUSE_UNIQUE_RESEND == 1 << 63
    assert (uapi.FUSE_IO_URING_CMD_ADD_QUEUE, uapi.FUSE_IO_URING_CMD_ADD_BUFPOOL) == (3, 4)


GENERATIONS = {
    "G6": {"FUSE_ATTR_IOMAP": 4, "FUSE_ATTR_ATOMIC": 8, "FUSE_ATTR_APPEND": 0x40,
           "FUSE_IOMAP_TYPE_PURE_OVERWRITE": 255, "FUSE_IOMAP_TYPE_RETRY_CACHE": 254,
           "FUSE_IOMAP_OP_WRITEBACK": 1 << 31, "FUSE_IOMAP_OP_SWAPFILE": 1 << 30},
    "G7": {"FUSE_ATTR_EXCLUSIVE": 4, "FUSE_ATTR_IOMAP": 8, "FUSE_ATTR_ATOMIC": 0x10, "FUSE_ATTR_APPEND": 0x80,
           "FUSE_IOMAP_TYPE_PURE_OVERWRITE": 255, "FUSE_IOMAP_TYPE_NOCACHE": 253,
           "FUSE_IOMAP_OP_WRITEBACK": 1 << 31, "FUSE_IOMAP_OP_SWAPFILE": 1 << 30},
    "GL": {"FUSE_ATTR_EXCLUSIVE": 4, "FUSE_ATTR_IOMAP": 0xC, "FUSE_ATTR_SYNC": 0x20, "FUSE_ATTR_IMMUTABLE": 0x40,
           "FUSE_IOMAP_TYPE_PURE_OVERWRITE": 65535, "FUSE_IOMAP_TYPE_RETRY_CACHE": 65534,
           "FUSE_IOMAP_TYPE_NOCACHE": 65533, "FUSE_IOMAP_TYPE_MAPPED_STRIPE": 65532,
           "FUSE_IOMAP_TYPE_UNWRITTEN_STRIPE": 65531, "FUSE_IOMAP_OP_WRITEBACK": 1 << 11,
           "FUSE_IOMAP_OP_SWAPFILE": 1 << 31},
}  # fmt: skip
"""Table 0.1 of the extension's description."""

IOMAP_SIZES = {
    "iomap_support": 16, "iomap_io": 32, "iomap_begin_in": 32, "iomap_begin_out": 64, "iomap_end_in": 72,
    "iomap_config_in": 64, "freezefs_in": 8, "shutdownfs_in": 8, "backing_inval_out": 24, "statx": 256,
    "iomap_upsert_mappings_out": 80, "iomap_inval_mappings_out": 48, "iomap_backing_blocksize": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", GENERATIONS)
def test_iomap_generations_match_the_tables(name: str) -> None:
    generation = uapi.iomap(name)
    assert {key: getattr(generation, key) for key in GENERATIONS[name]} == GENERATIONS[name]
    assert {key: getattr(generation, key).size for key in IOMAP_SIZES} == IOMAP_SIZES
    assert generation.iomap_ioend_in.size == (40 if name == "G6" else 48)
    assert generation.iomap_config_out.size == (96 if name == "G6" else 104)
    assert generation.FUSE_IOMAP == uapi.FUSE_HAS_IO_URING_BUFPOOL == 1 << 43
    assert (generation.FUSE_FREEZE_FS, generation.FUSE_IOMAP_END) == (4089, 4095)


def test_iomap_layouts_match_the_tables() -> None:
    latest = uapi.iomap("GL")
    assert latest.iomap_end_in.offsets == {
        "opflags": 0, "attr_ino": 8, "pos": 16, "count": 24, "written": 32, "map.offset": 40, "map.length": 48,
        "map.addr": 56, "map.type": 64, "map.flags": 66, "map.dev": 68,
    }  # fmt: skip
    assert latest.iomap_ioend_in.offsets == {
        "flags": 0, "error": 4, "attr_ino": 8, "pos": 16, "new_addr": 24, "written": 32, "dev": 40,
    }  # fmt: skip
    assert latest.iomap_config_out.offsets == {
        "flags": 0, "s_id": 8, "s_uuid": 40, "s_uuid_len": 56, "s_blocksize": 60, "s_max_links": 64,
        "s_time_gran": 68, "s_time_min": 72, "s_time_max": 80, "s_maxbytes": 88, "cache_maxbytes": 96,
    }  # fmt: skip
    assert latest.statx.offsets["mnt_id"] == 144
    assert latest.statx.offsets["subvol"] == 160
    assert latest.statx.offsets["atomic_write_unit_max_opt"] == 184
    assert uapi.iomap("G6").iomap_ioend_in.offsets["written"] == 32
    assert latest.iomap_stripe_config.offsets == {"nr_strips": 0, "strip_width": 8}


def test_generations_keep_to_themselves() -> None:
    with pytest.raises(AttributeError, match=r"G6 .* 'FUSE_ATTR_EXCLUSIVE'"):
        _ = uapi.iomap("G6").FUSE_ATTR_EXCLUSIVE
    assert not hasattr(uapi, "FUSE_IOMAP_BEGIN")
    assert not hasattr(uapi, "iomap_io")
    with pytest.raises(KeyError):
        uapi.iomap("G8")


def test_encode_and_decode_are_inverse() -> None:
    values = {name: 0x1122334455667788 + n for n, name in enumerate(uapi.lk_in.fields)}
    values |= {"lk.type": 0x11223344, "lk.pid": 0x55667788, "lk_flags": 0x99AABBCC}
    raw = uapi.lk_in.encode(**values)
    assert uapi.lk_in.decode(b"skip" + raw, 4) == values
    assert raw[-4:] == bytes(4), "padding is zero"


def test_encode_refuses_unknown_fields() -> None:
    with pytest.raises(TypeError, match="getattr_in has no field fhh"):
        uapi.getattr_in.encode(fhh=1)


def test_times_before_1970_are_negative() -> None:
    raw = uapi.setattr_in.encode(mtime=-5)
    assert raw[40:48] == (-5).to_bytes(8, sys.byteorder, signed=True)
    assert uapi.setattr_in.decode(raw)["mtime"] == -5


def test_missing_names_are_attribute_errors() -> None:
    for name in ("FUSE_NOTHING", "nothing_in", "__wrapped__"):
        assert not hasattr(uapi, name)


# An editable installation finds the checkout's modules where this package has none.
NOT_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if not f.__module__.startswith('__editable__')];"


def _run(code: str, generated: str | None, tmp_path: Path) -> str:
    """What this code prints in a fresh interpreter whose fusewire has this text for its generated module, or none."""
    package = tmp_path / "fusewire"
    package.mkdir()
    for source in ("__init__", "uapi", "uapi_text", "uapi_iomap", "uapi_build"):
        (package / f"{source}.py").write_bytes((PROJECT / "fusewire" / f"{source}.py").read_bytes())
    if generated is not None:
        (package / "_uapi.py").write_text(generated)
    done = subprocess.run([sys.executable, "-c", NOT_EDITABLE + code], cwd=tmp_path, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The module that the build script makes from the present declarations."""
    target = tmp_path_factory.mktemp("generated") / "_uapi.py"
    code = f"from fusewire.uapi_build import ffi; ffi.emit_python_code({str(target)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, capture_output=True)
    return target.read_text()


SHOW = (
    "import sys; from fusewire import uapi;"
    "print(uapi.FUSE_STATX, uapi.statx_out.size, uapi.iomap('GL').iomap_end_in.size, 'pycparser' in sys.modules)"
)


def test_generated_module_spares_the_parser(generated: str, tmp_path: Path) -> None:
    assert _run(SHOW, generated, tmp_path) == "52 288 72 False"


def test_without_generated_module_the_text_is_parsed(tmp_path: Path) -> None:
    assert _run(SHOW, None, tmp_path) == "52 288 72 True"


def test_stale_generated_module_is_not_used(generated: str, tmp_path: Path) -> None:
    code = "import fusewire.uapi_text as t; t.DIGEST += 1;" + SHOW
    assert _run(code, generated, tmp_path) == "52 288 72 True"


def test_damaged_generated_module_is_not_used(tmp_path: Path) -> None:
    assert _run(SHOW, "ffi = None\n", tmp_path) == "52 288 72 True"


def test_every_generation_is_in_the_text() -> None:
    assert all(text in uapi_text.TEXT for text in GENERATION_TEXTS.values())


def _uapi_names(path: Path) -> set[str]:
    """Attributes of `uapi` that a source file uses."""
    tree = ast.parse(path.read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "uapi"
    }


def test_names_that_the_project_uses_exist() -> None:
    """mypy sees Any behind `uapi`; this finds the misspelt constant."""
    used = {name for path in PROJECT.glob("fusewire/**/*.py") for name in _uapi_names(path)}
    assert len(used) > 100
    assert [name for name in sorted(used) if not hasattr(uapi, name)] == []
