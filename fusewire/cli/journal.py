"""``fusewire journal SOURCE``: what the journal of an image or device holds, and what a replay of it would do."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from fusewire.blockdev import BlockDevice
from fusewire.ext4 import journalfile, recovery
from fusewire.ext4.blocks import BlockMiss
from fusewire.ext4.errors import Check, Corrupt, Ext4Error
from fusewire.ext4.fastcommit import AddRange, Change, Create, DelRange, InodeImage, Link
from fusewire.ext4.filesystem import Ext4, Options
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.journalsuper import JournalSuperblock
from fusewire.ext4.recovery import Replay, Transaction
from fusewire.ext4.superblock import Superblock
from fusewire.ext4.units import SUPERBLOCK_OFFSET_BYTES

EXIT_FAILURE = 32
SUPERBLOCK_BYTES = 1024
MAX_SHOWN = 100     # transactions and changes that the text lists; JSON has all
_CLEAN, _TO_REPLAY, _DAMAGED = "nothing to replay", "to be replayed", "damaged: a mount refuses it, run e2fsck"
_LEFT_OVER = "holds transactions, but the file system says that it needs no recovery: a mount drops them"


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "journal", help="tell what a replay of the journal would do",
        description="Tell what the journal of an ext4 image or device holds and what a replay of it, which is what the "
                    "next mount does, would change. Nothing is replayed and nothing is written. The exit code is 32 if "
                    "the journal is damaged.",
        epilog="example: fusewire journal disk.img")
    parser.add_argument("source", metavar="SOURCE", help="an image file or a block device")
    parser.add_argument("--offset", type=int, default=0, metavar="BYTES",
                        help="where the file system begins inside SOURCE (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the facts; an exit code of mount(8)."""
    try:
        device = BlockDevice(os.open(args.source, os.O_RDONLY | os.O_CLOEXEC), args.offset)
        try:
            facts = facts_of(device)
        finally:
            device.close()
    except (OSError, Ext4Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        print(f"fusewire: {args.source}: {_where(error)}{reason}", file=sys.stderr)
        return EXIT_FAILURE
    print(json.dumps(facts, indent=2) if args.json else _text(facts))
    return EXIT_FAILURE if facts.get("damage") else 0


def _where(error: Exception) -> str:
    if not isinstance(error, Corrupt):
        return ""
    return "superblock: " if error.check.name.startswith("SUPER") else "journal: "


def facts_of(device: BlockDevice) -> dict[str, Any]:
    """Every fact by a stable key.  Raises OSError or ``Ext4Error``."""
    superblock = Superblock.parse(device.read(SUPERBLOCK_OFFSET_BYTES, SUPERBLOCK_BYTES), device.size_bytes)
    fs = Ext4(superblock, options=Options(noload=True))
    file = _fetching(device, fs, lambda: journalfile.locate(fs))
    if file is None:
        return {"journal": "none"}
    geometry = fs.geometry

    def read(block: int) -> bytes:
        data = device.read(geometry.byte_of(file.place(block)), geometry.block_bytes)
        if len(data) < geometry.block_bytes:
            raise Corrupt(Check.JOURNAL_INODE, journal_block=block)
        return data

    journal = JournalSuperblock.parse(read(0), geometry.block_bytes, file.blocks)
    replay = recovery.recover(journal, file, geometry, read)
    return {**_place(file, journal), **_state(superblock, replay), **_log(replay), **_fast_commits(replay)}


def _fetching(device: BlockDevice, fs: Ext4, function: Callable[[], JournalFile | None]) -> JournalFile | None:
    """The function's result, the blocks that it misses read from the device."""
    geometry = fs.geometry
    while True:
        try:
            return function()
        except BlockMiss as miss:
            for first, count in miss.runs:
                raw = device.read(geometry.byte_of(first), geometry.byte_of(count))
                fs.cache.admit({first + index: raw[geometry.byte_of(index):geometry.byte_of(index + 1)]
                                for index in range(count)})


def _place(file: JournalFile, journal: JournalSuperblock) -> dict[str, Any]:
    return {
        "journal": "internal",
        "blocks": journal.maxlen, "block_size": journal.block_bytes, "size": journal.maxlen * journal.block_bytes,
        "extents": len(file.extents), "found_by": "superblock copy" if file.from_backup else "inode",
        "version": journal.version, "checksums": journal.checksums.value,
        "features": sorted(feature.title for feature in journal.features),
        "error": os.strerror(journal.errno) if journal.errno else "",
    }


def _state(superblock: Superblock, replay: Replay) -> dict[str, Any]:
    state = _TO_REPLAY if superblock.needs_recovery else _LEFT_OVER
    if not replay.journal.start:
        state = _CLEAN
    elif replay.damage:
        state = _DAMAGED
    return {"state": state, "damage": [str(damage) for damage in replay.damage],
            "sequence": replay.journal.sequence, "start": replay.journal.start, "end": replay.head,
            "next_sequence": replay.next_sequence}


def _log(replay: Replay) -> dict[str, Any]:
    return {"transactions": [_transaction(transaction) for transaction in replay.transactions],
            "blocks_to_write": len(replay), "bytes_to_write": len(replay) * replay.journal.block_bytes,
            "blocks_revoked": replay.revoked}


def _transaction(transaction: Transaction) -> dict[str, Any]:
    return {"sequence": transaction.sequence, "start": transaction.start, "committed": transaction.seconds,
            "logged_blocks": transaction.logged, "revocation_blocks": len(transaction.revocations)}


def _fast_commits(replay: Replay) -> dict[str, Any]:
    found = replay.fast_commits
    changes = [] if found is None else [_change(change) for change in found]
    return {"fast_commits": 0 if found is None else found.commits, "fast_commit_changes": changes}


def _change(change: Change) -> dict[str, Any]:
    if isinstance(change, InodeImage):
        return {"change": "inode", "inode": change.inode}
    if isinstance(change, AddRange):
        return {"change": "add range", "inode": change.inode, "file_block": change.file_block,
                "length": change.length, "block": change.start, "unwritten": change.unwritten}
    if isinstance(change, DelRange):
        return {"change": "delete range", "inode": change.inode, "file_block": change.file_block,
                "length": change.length}
    kind = "create" if isinstance(change, Create) else "link" if isinstance(change, Link) else "unlink"
    return {"change": kind, "parent": change.parent, "inode": change.inode, "name": os.fsdecode(change.name)}


# ---- as text -----------------------------------------------------------------------------------------------

def _text(facts: dict[str, Any]) -> str:
    rows = {key.replace("_", " "): _shown(key, value) for key, value in facts.items() if value not in (None, "", [])}
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {_printable(value, width)}" for name, value in rows.items())


def _shown(key: str, value: Any) -> str:
    if key == "transactions":
        return _listed([_transaction_text(row) for row in value])
    if key == "fast_commit_changes":
        return _listed([", ".join(_change_text(row)) for row in value])
    if key == "damage":
        return _listed(value)
    return " ".join(value) if isinstance(value, list) else str(value)


def _listed(lines: list[str]) -> str:
    """One line each, as many as are good to read."""
    more = [f"… and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    return "\n".join(lines[:MAX_SHOWN] + more)


def _transaction_text(row: dict[str, Any]) -> str:
    return (f"{row['sequence']} at {row['start']}, {_when(row['committed'])}: {row['logged_blocks']} logged blocks, "
            f"{row['revocation_blocks']} revocation blocks")


def _when(seconds: int) -> str:
    """The time, or the bare number where no calendar reaches (debugfs writes such)."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds} s"


def _change_text(row: dict[str, Any]) -> list[str]:
    return [row["change"]] + [f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key != "change"]


def _printable(text: str, width: int) -> str:
    """The text without control characters (names come from the disk), further lines indented."""
    lines = ["".join(character if character.isprintable() else "?" for character in line)
             for line in text.split("\n")]
    return f"\n{' ' * (width + 2)}".join(lines)
