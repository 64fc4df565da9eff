"""Images that the kernel left dirty, recovered by a mount: what was fsynced is there, and e2fsck finds nothing.

Where the kernel's own recovery is right, both trees are the same.  (With fast commits it is not always: after mkdir and
rmdir its link counts are wrong, and an open file without a name makes it refuse the mount; Linux 6.18.)
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fusewire.ext4 import checksum, errorlog, iomap, layout
from fusewire.ext4.journal import JournalWriter
from tests.dirty import (
    FAST,
    Image,
    assert_clean,
    assert_same,
    directories,
    fast_commits,
    files,
    first,
    recovered,
    recovered_by_kernel,
    settled,
    sha,
    sync,
    tree_of,
    write,
)
from tests.journals import opened
from tests.mounting import (
    MountRefused,
    fusewire_command,
    fusewire_environment,
    fusewire_mount,
    kernel_mount,
    mount_point,
    run,
    wait_mounted,
    wait_unused,
)

# ---- fast commits ------------------------------------------------------------------------------------------



def lost(root: Path) -> None:
    """What nobody has made durable."""
    (root / "lost").write_bytes(b"lost")


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_fsynced_files_are_there_as_after_the_kernels_recovery(block_bytes: int, mounts: None, tmp_path: Path) -> None:
    image = Image(tmp_path / "image", f"-b {block_bytes} {FAST}")
    expected = image.leave(first, files, last=lost)
    assert fast_commits(image.path) > 5
    _, tree = recovered(image)
    assert_same(settled(tree), expected)
    assert_same(tree, recovered_by_kernel(image))


def test_fsynced_directories_are_there_with_the_right_counts(mounts: None, tmp_path: Path) -> None:
    """The kernel's replay counts links of directories wrongly, so what its mount showed before is compared with."""
    image = Image(tmp_path / "image", f"-b 1024 {FAST}")
    expected = image.leave(first, directories, last=lost)
    assert fast_commits(image.path) >= 3
    _, tree = recovered(image)
    assert_same(settled(tree), expected)


def test_an_open_file_without_a_name_is_freed(mounts: None, tmp_path: Path) -> None:
    """The kernel refuses to mount this one."""
    image = Image(tmp_path / "image", f"-b 1024 {FAST}")

    def unlink_open(root: Path) -> None:
        handle = os.open(root / "gone", os.O_RDWR)
        image.open_files.append(handle)
        os.unlink(root / "gone")
        os.write(handle, b"still written")
        os.fsync(handle)

    image.leave(first, unlink_open)
    assert fast_commits(image.path)
    _, tree = recovered(image)
    assert "/gone" not in tree and "/old" in tree


@pytest.mark.parametrize("seed", range(3))
def test_random_fast_commits(seed: int, mounts: None, tmp_path: Path) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    image = Image(tmp_path / "image", f"-b {chance.choice((1024, 2048, 4096))} {FAST}")

    def work(root: Path) -> None:
        for _ in range(60):
            random_operation(root / "folder", chance)
        sync(root)

    expected = image.leave(first, work, last=lost)
    assert fast_commits(image.path)
    _, tree = recovered(image)
    assert_same(settled(tree), expected)
    assert_same(tree, recovered_by_kernel(image))


def random_operation(folder: Path, chance: random.Random) -> None:
    names = sorted(folder.iterdir())
    name, other = chance.choice(names), folder / f"r{chance.randrange(40)}"
    kind = chance.choice(("write", "write", "write", "unlink", "link", "rename", "cut", "punch", "reserve", "chmod"))
    if kind == "write" or len(names) < 5:
        with open(other, "r+b" if other.exists() else "wb") as file:
            file.seek(chance.randrange(30000))
            file.write(chance.randbytes(chance.randrange(1, 9000)))
            file.flush()
            os.fsync(file.fileno())
    elif kind == "unlink":
        name.unlink()
    elif kind == "link" and not other.exists():
        os.link(name, other)
    elif kind == "rename":
        os.rename(name, other)
    elif kind == "cut":
        os.truncate(name, chance.randrange(20000))
    elif kind in ("punch", "reserve"):
        # The kernel logs nothing when blocks that were reserved get data, so those are never written to.
        place = ["-p", "-o", str(chance.randrange(20000))] if kind == "punch" else ["-o", "50000"]
        subprocess.run(["fallocate", *place, "-l", "7000", name], check=True)
    else:
        os.chmod(name, chance.randrange(0o1000) | 0o200)


# ---- other logs --------------------------------------------------------------------------------------------

def grown(root: Path) -> None:
    for number in range(20):
        folder = root / f"d{number}"
        folder.mkdir()
        write(folder / "file", os.urandom(3000) + b"\xc0\x3b\x39\x98" * 300)
    sync(root)
    shutil.rmtree(root / "d3")
    write(root / "magic", b"\xc0\x3b\x39\x98" * 2000)


@pytest.mark.parametrize("mkfs, options", [
    ("-b 1024 -J size=4", "rw"), ("-b 4096 -J size=8", "rw,data=journal"), ("-b 1024 -J size=4", "rw,data=journal"),
    ("-b 2048 -J size=4 -O ^metadata_csum,^64bit,uninit_bg", "rw,journal_checksum"),
    ("-b 1024 -J size=4 -O ^extent,^metadata_csum,^64bit,^flex_bg -I 128", "rw"),
], ids=["ordered", "data-4k", "data-1k", "checksum-v1", "ext3"])
def test_a_log_of_the_kernel_is_replayed(mkfs: str, options: str, mounts: None, tmp_path: Path) -> None:
    """With data=journal the newest data are in the log only, also for who reads them without replaying."""
    image = Image(tmp_path / "image", mkfs, options)
    expected = image.leave(grown, last=lost)
    _, tree = recovered(image)
    assert_same(settled(tree), expected)
    assert_same(tree, recovered_by_kernel(image))


def test_noload_shows_the_file_system_unreplayed_and_needs_ro(mounts: None, tmp_path: Path) -> None:
    """As much of it as the kernel has brought home, and so with errors here and there."""
    image = Image(tmp_path / "image", "-b 1024 -J size=4")
    complete = image.leave(grown)
    before = sha(image.path)
    with kernel_mount(image.path, "ro,noload,noatime") as mounted:
        expected = tree_of(mounted.root)
    with fusewire_mount(image.path, "ro,noload,noatime") as mounted:
        assert_same(tree_of(mounted.root), expected)
    assert settled(expected) != complete
    with pytest.raises(MountRefused, match=r"noload.*needs ro"), fusewire_mount(image.path, "rw,noload"):
        pass
    assert sha(image.path) == before


def test_a_copy_of_the_superblock_does_not_hide_what_is_to_be_replayed(mounts: None, tmp_path: Path) -> None:
    """Copies do not have the flag needs_recovery."""
    image = Image(tmp_path / "image", "-b 1024 -J size=4")
    expected = image.leave(grown, last=lost)
    before = sha(image.path)
    with fusewire_mount(image.path, "ro,noatime,sb=8193") as mounted:
        assert_same(settled(tree_of(mounted.root)), expected)
        assert "in memory" in mounted.log_text()
    with fusewire_mount(image.path, "ro,noatime,sb=8193,noload") as mounted:
        assert settled(tree_of(mounted.root)) != expected
    assert sha(image.path) == before


def test_a_log_that_needs_no_recovery_is_void(mounts: None, tmp_path: Path) -> None:
    """The flag needs_recovery is off although the log begins somewhere: nothing of it may come back, nor continue what
    we log in its place."""
    image = Image(tmp_path / "image", "-b 1024 -J size=4")
    with kernel_mount(image.path, "rw") as mounted:
        write(mounted.root / "file", b"good" * 256)
    with opened(image.path) as disk:
        place = disk.run(lambda fs: iomap.find(fs, fs.inode(12), 0), disk.fs).start
        assert place is not None and disk.read_home(place) == b"good" * 256
        journal, head = disk.journal, disk.journal.first
        writer = JournalWriter(journal, head, journal.sequence)
        begun = writer.begin()
        assert begun is not None
        disk.write(0, begun)
        for number in range(200):
            encoded = writer.encode([(place, b"bad!" * 256)], (), number)
            for position, data in (*encoded.records, encoded.commit):
                disk.write(position, data)
        assert len(disk.recover().transactions) == 200
        assert not disk.fs.superblock.needs_recovery
    killed(image.path, lambda root: [write(root / f"new{number}", b"n" * 3000) for number in range(10)])
    with opened(image.path) as disk:
        ours = disk.recover().transactions
        assert ours and ours[-1].sequence < ours[0].sequence + 100
    with fusewire_mount(image.path, "rw") as mounted:
        assert (mounted.root / "file").read_bytes() == b"good" * 256
        assert (mounted.root / "new9").read_bytes() == b"n" * 3000
    assert_clean(image.path)


def killed(path: Path, work: Callable[[Path], object]) -> None:
    """Let our daemon be killed when ``work`` is done."""
    with mount_point() as target:
        command = [*fusewire_command(), "mount", "-f", "-o", "rw", str(path), str(target)]
        process = subprocess.Popen(command, env=fusewire_environment(), cwd="/")
        try:
            assert wait_mounted(target, process)
            work(target)
        finally:
            process.kill()
            process.wait()
            run("umount", "-l", target, check=False)
    wait_unused(path)


# ---- errors ------------------------------------------------------------------------------------------------

def edit_super(path: Path, **fields: int) -> None:
    raw = bytearray(path.read_bytes()[1024:2048])
    for name, value in fields.items():
        kind = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}[layout.SUPERBLOCK.types[name]]
        at = layout.SUPERBLOCK.offsets[name]
        raw[at:at + kind] = value.to_bytes(kind, "little")
    checksum.seal_superblock(raw)
    with open(path, "r+b") as file:
        file.seek(1024)
        file.write(raw)


def test_errors_of_the_journal_and_of_the_superblock_survive(mounts: None, tmp_path: Path) -> None:
    """An error was noted in the superblock behind the journal's back; the journal itself was given up, too."""
    image = Image(tmp_path / "image", "-b 1024 -J size=4")
    image.leave(grown)
    edit_super(image.path, error_count=7, last_error_time=1_600_000_000, last_error_line=1234)
    with opened(image.path) as disk:
        disk.write(0, disk.journal.patched(errno=(1 << 32) - 5))
    with fusewire_mount(image.path, "ro") as mounted:
        assert "input/output error" in mounted.log_text()
    with fusewire_mount(image.path, "rw") as mounted:
        assert (mounted.root / "magic").exists()
    shown = run("dumpe2fs", "-h", image.path).stdout
    assert "Filesystem state:         clean with errors" in shown and "needs_recovery" not in shown
    assert "FS Error count:           7" in shown and "1234" in shown.split("Last error line")[1]
    with opened(image.path) as disk:
        assert disk.journal.errno == 0
    run("e2fsck", "-fy", image.path, check=False)
    assert_clean(image.path)


def test_a_damaged_log_keeps_the_file_system_as_it_is(mounts: None, tmp_path: Path) -> None:
    """A transaction with a wrong checksum before others: as with the kernel, there is no mount, and nothing changes."""
    image = Image(tmp_path / "image", "-b 1024 -J size=4")
    image.leave(grown)
    with opened(image.path) as disk:
        place = disk.recover().transactions[0].descriptors[0]
        raw = bytearray(disk.read(place))
        raw[40] ^= 1
        disk.write(place, bytes(raw))
    before = sha(image.path)
    for options in ("rw", "ro"):
        with pytest.raises(MountRefused, match="journal: "), fusewire_mount(image.path, options):
            pass
    assert sha(image.path) == before


def test_carried_over_errors_are_the_newest() -> None:
    before, after = bytearray(1024), bytearray(1024)
    struct.pack_into("<I", before, 0x194, 3)
    struct.pack_into("<H", before, 0x3A, errorlog.STATE_ERRORS)
    assert errorlog.carry_over(bytes(before), bytes(after), 0) == bytes(before)
    struct.pack_into("<I", after, 0x194, 4)
    kept = errorlog.carry_over(bytes(before), bytes(after), 5)
    assert kept[0x194] == 4 and kept[0x3A] == errorlog.STATE_ERRORS
    assert errorlog.carry_over(bytes(1024), bytes(1024), 0) == bytes(1024)


# ---- orphans -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("feature", ["orphan_file", "^orphan_file"])
def test_orphans_of_the_kernel_are_freed_at_a_writable_mount(feature: str, mounts: None, tmp_path: Path) -> None:
    image = Image(tmp_path / "image", f"-b 1024 -J size=4 -O {feature}")

    def leave_open(root: Path) -> None:
        for number in range(40):
            path = root / f"o{number}"
            path.write_bytes(b"o" * 5000 * (number % 7))
            image.open_files.append(os.open(path, os.O_RDONLY))
        for number in range(40):
            os.unlink(root / f"o{number}")
        sync(root)

    image.leave(grown, leave_open)
    path, tree = recovered(image)
    assert "/magic" in tree
    assert_same(tree, recovered_by_kernel(image))
    assert "Inode count" in run("dumpe2fs", "-h", path).stdout


@pytest.mark.parametrize("block_bytes", [1024, 4096])
def test_a_file_that_was_being_cut_is_cut_and_its_tail_is_zero(block_bytes: int, mounts: None, tmp_path: Path) -> None:
    """As after a crash in a truncate: the size is stored, the blocks and what they hold are not gone yet."""
    image = Image(tmp_path / "image", f"-b {block_bytes} -J size=8 -O ^orphan_file")
    with kernel_mount(image.path, "rw") as mounted:
        write(mounted.root / "cut", b"c" * 50 * block_bytes)
        number = (mounted.root / "cut").stat().st_ino
    script = tmp_path / "script"
    script.write_text(f"sif <{number}> size {block_bytes + 10}\nssv last_orphan {number}\n")
    run("debugfs", "-w", "-f", script, image.path)
    with fusewire_mount(image.path, "rw") as mounted:
        assert (mounted.root / "cut").stat().st_blocks * 512 == 2 * block_bytes
        os.truncate(mounted.root / "cut", 3 * block_bytes)
        expected = b"c" * (block_bytes + 10) + bytes(2 * block_bytes - 10)
        assert (mounted.root / "cut").read_bytes() == expected
        assert "finished 1 deleted or shortened" in mounted.log_text()
    assert_clean(image.path)
    with kernel_mount(image.path, "ro") as mounted:
        assert (mounted.root / "cut").read_bytes() == expected
