"""``fusewire journal``: what it tells of clean, dirty and damaged journals, and that it changes nothing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusewire.cli import main
from fusewire.ext4.journal import JournalWriter
from fusewire.ext4.journalsuper import Checksums
from tests.journals import left_dirty, opened, with_format
from tests.mounting import run

SECOND = 1_000_000_000
Tell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tell(capsys: pytest.CaptureFixture[str]) -> Iterator[Tell]:
    """A function that runs ``fusewire journal`` with arguments: (exit code, output, errors)."""

    def told(*arguments: object) -> tuple[int, str, str]:
        code = main(["journal", *map(str, arguments)])
        output = capsys.readouterr()
        return code, output.out, output.err

    yield told


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, 16 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-J", "size=1", path)
    return path


def dirtied(path: Path, time_ns: int = 1_700_000_000 * SECOND) -> JournalWriter:
    """Two transactions in the log; block 6000 comes from the second, 6001 is revoked by it."""
    with opened(path) as disk:
        disk.write(0, with_format(disk.journal.raw, Checksums.V3, True))
        disk.set_needs_recovery(True)
        writer = disk.writer()
        disk.write(0, writer.begin() or b"")
        for logged, revoked in (({6000: b"a", 6001: b"b", 6002: b"c"}, ()), ({6000: b"d"}, (6001,))):
            encoded = writer.encode([(block, byte * 1024) for block, byte in logged.items()], revoked, time_ns)
            for position, data in (*encoded.records, encoded.commit):
                disk.write(position, data)
    return writer


def test_a_clean_journal(image: Path, tell: Tell) -> None:
    code, output, _ = tell(image, "--json")
    facts = json.loads(output)
    assert code == 0 and facts["state"] == "nothing to replay" and facts["transactions"] == []
    assert (facts["blocks"], facts["block_size"], facts["size"]) == (1024, 1024, 1 << 20)
    assert "nothing to replay" in tell(image)[1]


def test_a_dirty_journal_is_told_and_not_touched(image: Path, tell: Tell) -> None:
    writer, before = dirtied(image), image.read_bytes()
    code, output, _ = tell(image, "--json")
    facts = json.loads(output)
    assert code == 0 and facts["state"] == "to be replayed" and facts["damage"] == []
    assert [row["logged_blocks"] for row in facts["transactions"]] == [3, 1]
    assert [row["revocation_blocks"] for row in facts["transactions"]] == [0, 1]
    assert [row["committed"] for row in facts["transactions"]] == [1_700_000_000] * 2
    assert (facts["blocks_to_write"], facts["bytes_to_write"], facts["blocks_revoked"]) == (2, 2048, 1)
    assert facts["end"] == writer.head and facts["next_sequence"] == writer.sequence + 1
    assert facts["features"] == ["journal_64bit", "journal_checksum_v3", "journal_incompat_revoke"]
    text = tell(image)[1]
    assert "3 logged blocks, 0 revocation blocks" in text and "blocks to write  2" in text
    assert image.read_bytes() == before


def test_a_journal_inside_a_larger_file(image: Path, tell: Tell, tmp_path: Path) -> None:
    dirtied(image)
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20) + image.read_bytes())
    assert tell(disk, "--offset", 1 << 20) == tell(image)
    assert tell(disk)[0] == 32


def test_damage_is_told_with_an_exit_code(image: Path, tell: Tell) -> None:
    dirtied(image)
    with opened(image) as disk:
        disk.write(disk.journal.start, disk.read(disk.journal.start)[:900] + b"?" * 124)
    code, output, _ = tell(image, "--json")
    facts = json.loads(output)
    assert code == 32 and facts["state"].startswith("damaged")
    assert "checksum of a finished transaction" in facts["damage"][0]
    assert tell(image)[0] == 32 and "checksum of a finished transaction" in tell(image)[1]


def test_transactions_that_the_superblock_does_not_know_of(image: Path, tell: Tell) -> None:
    dirtied(image)
    with opened(image) as disk:
        disk.set_needs_recovery(False)
    code, output, _ = tell(image)
    assert code == 0 and "a mount drops them" in output


def test_a_commit_time_that_no_calendar_has(image: Path, tell: Tell) -> None:
    dirtied(image, 7_711_103_460_543_823_872 * SECOND)
    code, output, _ = tell(image)
    assert code == 0 and "7711103460543823872 s" in output


def test_fast_commits_are_listed_and_names_cannot_drive_a_terminal(image: Path, mounts: None, tell: Tell) -> None:
    def first(root: Path) -> None:
        (root / "old").touch()
        os.sync()

    def fast(root: Path) -> None:
        with open(root / "\x1b[31mred", "wb") as file:
            file.write(b"x" * 3000)
            os.fsync(file.fileno())

    os.truncate(image, 64 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "fast_commit", image)
    left_dirty(image, "rw", (first, fast))
    facts = json.loads(tell(image, "--json")[1])
    assert facts["fast_commits"] == 1
    assert {row["change"] for row in facts["fast_commit_changes"]} == {"inode", "add range", "create"}
    text = tell(image)[1]
    assert "name ?[31mred" in text and "\x1b" not in text


@pytest.mark.parametrize("damage, message", [
    ((1024, b"\xff" * 1024), "superblock: not an ext2, ext3 or ext4 file system"),
    (None, "No such file or directory"),
])
def test_what_cannot_be_read_is_one_line(damage: tuple[int, bytes] | None, message: str, image: Path,
                                         tell: Tell) -> None:
    if damage is None:
        image.unlink()
    else:
        with open(image, "r+b") as file:
            file.seek(damage[0])
            file.write(damage[1])
    code, output, errors = tell(image)
    assert code == 32 and output == "" and errors.count("\n") == 1
    assert errors.startswith(f"fusewire: {image}: {message}")


def test_a_damaged_journal_superblock_is_one_line(image: Path, tell: Tell) -> None:
    with opened(image) as disk:
        disk.write(0, b"?" + disk.journal.raw[1:])
    code, _, errors = tell(image)
    assert code == 32 and "journal: journal superblock is malformed" in errors


def test_no_journal(image: Path, tell: Tell) -> None:
    run("tune2fs", "-O", "^has_journal", image)
    assert tell(image)[:2] == (0, "journal  none\n")
