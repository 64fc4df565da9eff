"""``fusewire info SOURCE``: what the superblock of an image or device says, in words people use."""

import argparse
import json
import os
import sys
import time
import uuid
from typing import Any

from fusewire.ext4.errors import Corrupt, Ext4Error
from fusewire.ext4.features import Feature
from fusewire.ext4.superblock import STATE_ERRORS, STATE_VALID, Superblock
from fusewire.ext4.units import SUPERBLOCK_OFFSET_BYTES

EXIT_USAGE, EXIT_FAILURE = 1, 32
SUPERBLOCK_BYTES = 1024
_ON_ERRORS = {1: "continue", 2: "remount-ro", 3: "panic"}
_HASHES = {0: "legacy", 1: "half_md4", 2: "tea", 6: "siphash"}
_SYSTEMS = {0: "Linux", 1: "Hurd", 2: "Masix", 3: "FreeBSD", 4: "Lites"}


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "info", help="tell what an ext4 image or device is, from its superblock",
        description="Tell what an ext4 image or device is: sizes, features, state and history, from its superblock. "
                    "Nothing is mounted and nothing is written.",
        epilog="example: fusewire info disk.img")
    parser.add_argument("source", metavar="SOURCE", help="an image file or a block device")
    parser.add_argument("--offset", type=int, default=0, metavar="BYTES",
                        help="where the file system begins inside SOURCE (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts; an exit code of mount(8)."""
    try:
        facts = facts_of(read_superblock(args.source, args.offset))
    except (OSError, Ext4Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        where = "superblock: " if isinstance(error, Corrupt) else ""
        print(f"fusewire: {args.source}: {where}{reason}", file=sys.stderr)
        return EXIT_FAILURE
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return 0


def read_superblock(source: str, offset_bytes: int) -> Superblock:
    """The superblock of the file system that begins at a byte of a file or device.  Raises OSError or ``Ext4Error``."""
    descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.lseek(descriptor, 0, os.SEEK_END) - offset_bytes
        raw = os.pread(descriptor, SUPERBLOCK_BYTES, offset_bytes + SUPERBLOCK_OFFSET_BYTES)
    finally:
        os.close(descriptor)
    return Superblock.parse(raw, size)


def facts_of(superblock: Superblock) -> dict[str, Any]:
    """Every fact by a stable key; sizes in bytes, times in seconds since 1970 (0: never)."""
    return {**_identity(superblock), **_sizes(superblock), **_state(superblock), **_layout(superblock)}


def _identity(superblock: Superblock) -> dict[str, Any]:
    fields, features = superblock.fields, superblock.features
    return {
        "type": _type_of(superblock),
        "label": superblock.label.decode("utf-8", "replace"),
        "uuid": str(uuid.UUID(bytes=superblock.uuid)),
        "last_mounted_at": _text_of(fields["last_mounted"]),
        "features": features.names(),
        "made_on": _SYSTEMS.get(fields["creator_os"], str(fields["creator_os"])),
        "revision": f"{fields['rev_level']}.{fields['minor_rev_level']}",
    }


def _sizes(superblock: Superblock) -> dict[str, Any]:
    fields, geometry = superblock.fields, superblock.geometry
    return {
        "size": geometry.byte_of(geometry.blocks),
        "free": geometry.byte_of(fields["free_blocks_count"] * geometry.cluster_blocks),
        "reserved_for_root": geometry.byte_of(fields["r_blocks_count"]),
        "overhead": geometry.byte_of(fields["overhead_blocks"] * geometry.cluster_blocks),
        "block_size": geometry.block_bytes,
        "cluster_size": geometry.byte_of(geometry.cluster_blocks),
        "inode_size": geometry.inode_bytes,
        "inodes": geometry.inodes,
        "inodes_free": fields["free_inodes_count"],
    }


def _state(superblock: Superblock) -> dict[str, Any]:
    fields, state = superblock.fields, superblock.fields["state"]
    return {
        "state": "errors" if state & STATE_ERRORS else "clean" if state & STATE_VALID else "not clean",
        "journal_to_replay": superblock.needs_recovery,
        "warnings": superblock.warnings(),
        "on_errors": _ON_ERRORS.get(fields["errors"], "continue"),
        "made": fields["mkfs_time"], "last_mounted": fields["mtime"], "last_written": fields["wtime"],
        "last_checked": fields["lastcheck"], "mounts_since_check": fields["mnt_count"],
        "errors_recorded": fields["error_count"],
        "first_error": _error(fields, "first"), "last_error": _error(fields, "last"),
        "written_in_its_life": fields["kbytes_written"] << 10,
    }


def _layout(superblock: Superblock) -> dict[str, Any]:
    fields, geometry, features = superblock.fields, superblock.geometry, superblock.features
    has_journal = Feature.HAS_JOURNAL in features
    return {
        "groups": geometry.groups,
        "blocks_per_group": geometry.blocks_per_group,
        "inodes_per_group": geometry.inodes_per_group,
        "flex_group_size": 1 << fields["log_groups_per_flex"] if Feature.FLEX_BG in features
        and fields["log_groups_per_flex"] < 32 else 1,
        "directory_hash": _HASHES.get(fields["def_hash_version"], "unknown"),
        "journal": ("external" if not fields["journal_inum"] else "internal") if has_journal else "none",
        "checksums": "metadata" if superblock.has_checksums else
        "group descriptors" if Feature.GDT_CSUM in features else "none",
    }


def _type_of(superblock: Superblock) -> str:
    features = superblock.features
    modern = (Feature.EXTENTS, Feature.BIT64, Feature.FLEX_BG, Feature.METADATA_CSUM, Feature.GDT_CSUM,
              Feature.HUGE_FILE, Feature.DIR_NLINK, Feature.EXTRA_ISIZE, Feature.INLINE_DATA, Feature.BIGALLOC)
    if any(feature in features for feature in modern):
        return "ext4"
    return "ext3" if Feature.HAS_JOURNAL in features else "ext2"


def _error(fields: dict[str, Any], which: str) -> dict[str, Any] | None:
    if not fields[f"{which}_error_time"]:
        return None
    return {"time": fields[f"{which}_error_time"], "function": _text_of(fields[f"{which}_error_func"]),
            "line": fields[f"{which}_error_line"], "inode": fields[f"{which}_error_ino"],
            "block": fields[f"{which}_error_block"]}


def _text_of(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _text(facts: dict[str, Any]) -> str:
    rows = {key.replace("_", " "): _shown(key, value) for key, value in facts.items() if value not in (None, "", [])}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {_printable(value)}" for name, value in rows.items())


def _shown(key: str, value: Any) -> str:
    if key in ("made", "last_mounted", "last_written", "last_checked"):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value)) if value else "never"
    if key in ("size", "free", "reserved_for_root", "overhead", "block_size", "cluster_size", "written_in_its_life"):
        return _bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value["time"]))
        return f"{when} in {value['function']}:{value['line']} (inode {value['inode']}, block {value['block']})"
    if isinstance(value, list):
        return (" " if key == "features" else "; ").join(value)
    return str(value)


def _bytes(count: int) -> str:
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}" + (f" ({count} bytes)" if unit not in ("B", "KiB") else "")


def _printable(text: str) -> str:
    """The text without control characters: labels come from the disk and must not drive a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
