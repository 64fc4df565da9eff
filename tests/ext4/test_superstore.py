"""The superblock as it changes: every field by name, sealed when a batch closes; what it says in use and after."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, commit, layout, mountstate, superstore
from fusewire.ext4.features import Feature
from fusewire.ext4.superblock import STATE_ERRORS, STATE_VALID, Superblock
from tests.ext4.driver import Editor, image, new_path, run_tool, seeded
from tests.ext4.writer import Writer

FORMS = ["-t ext4 -b 1024", "-t ext4 -b 2048", "-t ext4 -b 4096", "-t ext2 -b 1024", "-t ext4 -b 4096 -O ^64bit",
         "-t ext3 -b 4096"]
BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64}
NUMBERS = [name for name, kind in layout.SUPERBLOCK.types.items() if kind in BITS]


def raw_super(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read()[1024:2048]


@pytest.mark.parametrize("form", FORMS)
def test_every_field_is_stored_where_the_table_says(form: str) -> None:
    choose = seeded()
    ours = ("free_blocks_count_lo", "free_blocks_count_hi", "free_inodes_count", "wtime", "wtime_hi", "checksum")
    with Writer(image(form, 4096)) as writer:
        before = raw_super(writer.path)
        wanted = {name: choose.getrandbits(BITS[layout.SUPERBLOCK.types[name]]) for name in NUMBERS if name not in ours}
        writer.change(lambda tx: superstore.change(tx, **wanted, volume_name=b"short", max_mnt_count=-1))
        assert {name: superstore.get(writer.fs, name) for name in wanted} == wanted
        assert superstore.get(writer.fs, "max_mnt_count") == -1
        writer.commit()
        after = layout.SUPERBLOCK.decode(raw_super(writer.path))
        assert {name: after[name] for name in wanted} == wanted
        assert after["volume_name"] == b"short".ljust(16, b"\0")
        for name, kind in layout.SUPERBLOCK.types.items():
            if kind[0] == "b" and name != "volume_name":
                assert after[name] == layout.SUPERBLOCK.decode(before)[name], name
        if writer.fs.has_checksums:
            assert checksum.superblock_ok(raw_super(writer.path))


def test_longer_text_replaces_all_of_the_old() -> None:
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        writer.change(lambda tx: superstore.change(tx, volume_name=b"x" * 16))
        writer.change(lambda tx: superstore.change(tx, volume_name=b"y"))
        writer.check()
        assert "y\n" in run_tool("e2label", writer.path)


@pytest.mark.parametrize("form", FORMS)
def test_closing_a_batch_dates_and_counts(form: str) -> None:
    with Writer(image(form, 4096)) as writer:
        for seconds in (1_700_000_000, (1 << 32) + 5, (1 << 39) + 7):
            closed = commit.close(writer.fs, seconds)
            block, offset = superstore.place(writer.fs)
            fields = layout.SUPERBLOCK.decode(closed.blocks[block], offset)
            assert fields["wtime"] | fields["wtime_hi"] << 32 == seconds
            assert writer.fs.writing is not None
            free = fields["free_blocks_count_lo"] | fields["free_blocks_count_hi"] << 32
            assert (free, fields["free_inodes_count"]) == (
                writer.fs.writing.free_clusters, writer.fs.writing.free_inodes)
        writer.check()


def test_the_superblock_stays_in_memory() -> None:
    """Closing a batch must not wait for it."""
    with Writer(image("-t ext4 -b 1024", 4096)) as writer:
        for _ in range(3):
            writer.commit()
            assert 1 in writer.fs.cache._pinned


# ---- in use, and put away --------------------------------------------------------------------------------------------

def fields_of(writer: Writer, written: tuple[int, bytes]) -> dict[str, object]:
    block, data = written
    assert block == superstore.place(writer.fs)[0] and len(data) == writer.block_bytes
    offset = superstore.place(writer.fs)[1]
    record = data[offset:offset + 1024]
    assert not writer.fs.has_checksums or checksum.superblock_ok(record)
    return layout.SUPERBLOCK.decode(record)


@pytest.mark.parametrize("form", FORMS)
def test_in_use_and_put_away(form: str) -> None:
    with Writer(image(form, 4096)) as writer:
        journaled = Feature.HAS_JOURNAL in writer.fs.superblock.features
        count = superstore.get(writer.fs, "mnt_count")
        used = fields_of(writer, mountstate.in_use(writer.fs, (1 << 32) + 9, b"/mnt/" + b"x" * 100))
        assert used["mtime"] == 9 and used["mtime_hi"] == 1 and used["mnt_count"] == count + 1
        assert used["last_mounted"] == (b"/mnt/" + b"x" * 100)[:63] + b"\0"
        assert bool(used["feature_incompat"] & Feature.RECOVER.mask) == journaled  # type: ignore[operator]
        assert bool(used["state"] & STATE_VALID) == journaled  # type: ignore[operator]
        writer.change(lambda tx: superstore.change(tx, lpf_ino=0))
        writer.commit()
        fields = layout.SUPERBLOCK.decode(raw_super(writer.path))
        assert bool(fields["feature_incompat"] & Feature.RECOVER.mask) == journaled, "the batch knows of it"
        away = fields_of(writer, mountstate.put_away(writer.fs, 1_700_000_000))
        assert not away["feature_incompat"] & Feature.RECOVER.mask and away["state"] & STATE_VALID  # type: ignore[operator]
        assert away["wtime"] == 1_700_000_000
        writer.check()


def test_recorded_errors_are_not_wiped_by_putting_away() -> None:
    editor = Editor(image("-t ext4 -b 1024", 4096)).put_super(state=STATE_ERRORS)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        away = fields_of(writer, mountstate.put_away(writer.fs, 5))
        assert away["state"] == STATE_ERRORS


def test_the_number_of_mounts_stops_at_its_largest() -> None:
    editor = Editor(image("-t ext4 -b 1024", 4096)).put_super(mnt_count=0xFFFF)
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        assert fields_of(writer, mountstate.in_use(writer.fs, 5, b"/"))["mnt_count"] == 0xFFFF


def test_reserved_fields_are_kept() -> None:
    editor = Editor(image("-t ext4 -b 1024", 4096))
    at = layout.SUPERBLOCK.offsets["reserved"]
    with editor.super() as raw:
        raw[at:at + 8] = b"unknown!"
    path = new_path()
    path.write_bytes(editor.data)
    with Writer(path, copy=False) as writer:
        writer.change(lambda tx: superstore.change(tx, lpf_ino=5))
        writer.commit()
    raw_after = raw_super(path)
    assert raw_after[at:at + 8] == b"unknown!"
    assert Superblock.parse(raw_after, 4 << 20).fields["lpf_ino"] == 5
    assert struct.unpack_from("<H", raw_after, layout.SUPERBLOCK.offsets["magic"])[0] == 0xEF53
