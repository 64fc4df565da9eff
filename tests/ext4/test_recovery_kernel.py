"""Logs that the kernel and debugfs left, recovered by us and by the kernel: the same blocks and the same trees."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusewire.ext4 import directory
from fusewire.ext4.filesystem import Ext4
from fusewire.ext4.inode import Inode
from fusewire.ext4.journalsuper import Checksums
from fusewire.ext4.recovery import Replay
from tests.journals import Disk, left_dirty, opened
from tests.mounting import MountRefused, kernel_mount, run
from tests.walk import entries


@dataclass(frozen=True)
class Left:
    """One way to make an image and to mount it before it is left dirty."""

    mkfs: str
    options: str
    checksums: Checksums
    wide: bool


LEFT = {
    "v3-64": Left("-b 1024 -J size=4 -O metadata_csum,64bit", "rw", Checksums.V3, True),
    "v3-32-4k": Left("-b 4096 -J size=4 -O metadata_csum,^64bit", "rw", Checksums.V3, False),
    "none-32": Left("-b 1024 -J size=1 -O ^metadata_csum,^64bit", "rw", Checksums.NONE, False),
    "none-64-2k": Left("-b 2048 -J size=2 -O ^metadata_csum,64bit", "rw", Checksums.NONE, True),
    "v1": Left("-b 1024 -J size=1 -O ^metadata_csum,^64bit", "rw,journal_checksum", Checksums.V1, False),
    "v1-async": Left("-b 1024 -J size=1 -O ^metadata_csum,64bit", "rw,data=writeback,journal_async_commit",
                     Checksums.V1, True),
    "v3-async": Left("-b 1024 -J size=1 -O metadata_csum,64bit", "rw,data=writeback,journal_async_commit",
                     Checksums.V3, True),
    "v3-data": Left("-b 1024 -J size=2 -O metadata_csum,64bit", "rw,data=journal", Checksums.V3, True),
    "ext3": Left("-b 1024 -J size=1 -t ext3 -I 128 -O ^dir_index", "rw", Checksums.NONE, False),
}


def commit(root: Path) -> None:
    """Commit what is running by an fsync; sync(2) would also write blocks home, and the log would shrink."""
    with open(root / "marker", "ab") as file:
        file.write(b".")
        os.fsync(file.fileno())


def grow(root: Path) -> None:
    """Directories with names and data enough to use the ring."""
    for number in range(12):
        folder = root / f"d{number}"
        folder.mkdir()
        for index in range(20):
            (folder / f"{index:02d}-{'n' * 60}").write_bytes(os.urandom(300 * (index % 5)))
    commit(root)


def shrink(root: Path) -> None:
    """Directories go and their blocks become data: revocations."""
    for number in range(0, 12, 2):
        shutil.rmtree(root / f"d{number}")
    commit(root)
    for number in range(30):
        (root / f"data{number}").write_bytes(b"\xc0\x3b\x39\x98" + os.urandom(9000))
    commit(root)


def change(root: Path) -> None:
    """Attributes, names and links; an fsync, and something after it that never commits."""
    os.rename(root / "d1", root / "renamed")
    os.link(root / "data1", root / "renamed" / "link")
    os.symlink("s" * 100, root / "symlink")
    os.setxattr(root / "data2", "user.key", b"v" * 300)
    os.truncate(root / "data3", 4000)
    with open(root / "data4", "ab") as file:
        file.write(b"appended")
        os.fsync(file.fileno())
    (root / "never").mkdir()


def again(root: Path) -> None:
    for number in range(14):
        (root / "renamed" / f"again{number}").write_bytes(bytes(100))
        commit(root)


@pytest.fixture(scope="module")
def dirty(mounts: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A function from a name of LEFT to a copy of its image as the kernel left it."""
    folder = tmp_path_factory.mktemp("dirty")

    def make(name: str) -> Path:
        path, left = folder / name, LEFT[name]
        if not path.exists():
            path.touch()
            os.truncate(path, 24 << 20)
            type_ = () if "-t " in left.mkfs else ("-t", "ext4")
            run("mke2fs", "-q", "-F", *type_, *left.mkfs.split(), path)
            left_dirty(path, left.options, (grow, shrink, change, again, change_nothing))
        copies.append(folder / f"{name}.{len(copies)}")
        shutil.copyfile(path, copies[-1])
        return copies[-1]

    copies: list[Path] = []
    yield make
    shutil.rmtree(folder)


def change_nothing(root: Path) -> None:
    """The last step before the shutdown: what it makes is in memory only."""
    (root / "lost").mkdir()


def tree_of(path: Path) -> list[str]:
    """The tree as the kernel shows it, without what a mount changes; atime is not looked at because walks move it."""
    with kernel_mount(path, "ro,noload,noatime") as mounted:
        return [f"{name} {sorted((key, value) for key, value in fields.items() if key != 'atime')}"
                for name, fields in entries(mounted.root)]


def problems(path: Path) -> list[str]:
    """What e2fsck finds wrong, but for the superblock's free counts: those are not journaled, a mount sums them up."""
    text = run("e2fsck", "-fn", path, check=False).stdout
    return [line for line in text.splitlines() if line.endswith("? no") or ("wrong" in line
            and not re.match(r"Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.$", line))
            if line != "Fix? no"]


def recovered_by_kernel(path: Path) -> Path:
    copy = path.with_name(path.name + ".kernel")
    shutil.copyfile(path, copy)
    with kernel_mount(copy, "rw,noatime"):
        pass
    return copy


@pytest.mark.parametrize("name", LEFT)
def test_a_log_of_the_kernel_gives_the_kernels_tree(name: str, dirty: Callable[[str], Path]) -> None:
    path = dirty(name)
    with opened(path) as disk:
        journal, replay = disk.journal, disk.recover()
        assert (journal.checksums, journal.wide) == (LEFT[name].checksums, LEFT[name].wide)
        assert len(replay.transactions) > 1 and len(replay) > 20 and not replay.damage
        assert replay.failed_commit is None
        disk.replay_home(replay)
    expected = recovered_by_kernel(dirty(name))
    assert tree_of(path) == tree_of(expected)
    assert problems(path) == []


def test_the_kernels_logs_have_revocations_and_escapes(dirty: Callable[[str], Path]) -> None:
    """What the test above is worth: the rules it is about occur in its logs."""
    with opened(dirty("v3-64")) as disk:
        replay = disk.recover()
        assert any(transaction.revocations for transaction in replay.transactions) and replay.revoked
    with opened(dirty("v3-data")) as disk:
        replay = disk.recover()
        assert any(replay.source(block)[1] for block in replay.copies)  # type: ignore[index]


@pytest.mark.parametrize("name", ["v3-64", "none-32", "ext3"])
def test_a_replay_in_memory_shows_the_kernels_tree(name: str, dirty: Callable[[str], Path]) -> None:
    """The core reads through the overlay what the kernel reads after its recovery; the image stays as it is."""
    path = dirty(name)
    before = path.read_bytes()
    with opened(path) as disk:
        fs = disk.replayed(disk.recover())
        found = {name_: (inode.mode, inode.size, inode.links, inode.mtime[0]) for name_, inode in walk(disk, fs)}
    assert path.read_bytes() == before
    with kernel_mount(recovered_by_kernel(path), "ro") as mounted:
        expected = {}
        for folder, folders, files in os.walk(os.fsencode(mounted.root)):
            for name_ in folders + files:
                full = os.path.join(folder, name_)
                stat = os.lstat(full)
                shown = os.path.relpath(full, os.fsencode(mounted.root))
                expected[shown] = (stat.st_mode, stat.st_size, stat.st_nlink, int(stat.st_mtime))
    assert found == expected and b"data4" in found and b"lost" not in found


def walk(disk: Disk, fs: Ext4) -> Iterator[tuple[bytes, Inode]]:
    """All names below the root, read by the core."""
    waiting = [(b"", disk.run(fs_root, fs))]
    while waiting:
        prefix, folder = waiting.pop()
        for entry in disk.run(lambda fs, folder: list(directory.read(fs, folder, 0)), fs, folder):
            if entry.name not in (b".", b".."):
                inode = disk.run(lambda fs, number: fs.inode(number), fs, entry.inode)
                yield prefix + entry.name, inode
                if inode.is_dir:
                    waiting.append((prefix + entry.name + b"/", inode))


def fs_root(fs: Ext4) -> Inode:
    return fs.check()


# ---- logs of debugfs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("block_bytes", [1024, 4096])
@pytest.mark.parametrize("version, checksums", [("", Checksums.NONE), ("-c -v 1", Checksums.V1),
                                                ("-c -v 2", Checksums.V2), ("-c -v 3", Checksums.V3)])
@pytest.mark.parametrize("wide", ["64bit", "^64bit"])
def test_a_log_of_debugfs_gives_the_kernels_blocks(version: str, checksums: Checksums, wide: str, block_bytes: int,
                                                   mounts: None, tmp_path: Path) -> None:
    path, data, homes = tmp_path / "image", tmp_path / "data", list(range(4000, 4060))
    path.touch()
    os.truncate(path, block_bytes * 6000)
    csum = "^metadata_csum" if checksums in (Checksums.NONE, Checksums.V1) else "metadata_csum"
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", str(block_bytes), "-J", f"size={block_bytes // 1024}",
        "-O", f"{wide},{csum}", path)
    data.write_bytes(b"".join(b"\xc0\x3b\x39\x98" + os.urandom(block_bytes - 4) for _ in homes))
    # debugfs 1.47.0 gives transactions of version 1 that only revoke a checksum that nobody accepts
    script, revoke = tmp_path / "script", "" if checksums is Checksums.V1 else "jw -r 4003-4050\n"
    script.write_text(f"jo {version}\njw -b 4000-4059 {data}\n{revoke}jw -b 4005,4007 {data}\n"
                      f"jw -b 4058 -c {data}\njc\n")
    run("debugfs", "-w", "-f", script, path)
    with opened(path) as disk:
        assert disk.journal.checksums is checksums and disk.journal.wide is (wide == "64bit")
        replay = disk.recover()
        assert len(replay.transactions) == (3 if revoke else 2) and not replay.damage
        assert len(replay) == (60 - 48 + 2 if revoke else 60)
        found = {home: replay.content(home) or disk.read_home(home) for home in homes}
    with opened(recovered_by_kernel(path)) as disk:
        expected = {home: disk.read_home(home) for home in homes}
    assert [home for home in homes if found[home] != expected[home]] == []
    assert found[4000] == data.read_bytes()[:block_bytes] and found[4005] == found[4000]


# ---- the same damage for the kernel and for us ---------------------------------------------------------------

@pytest.mark.parametrize("name", ["none-32", "v1", "v3-64", "v1-async"])
def test_damage_in_the_log_is_judged_as_the_kernel_judges_it(name: str, dirty: Callable[[str], Path]) -> None:
    """One bit of the log turned at random: either both refuse, or both give the same content.

    We are milder in one point: a wrong copy that a later one replaces does no harm.
    """
    judged = {judge_damage(dirty(name), seed) for seed in range(10)}
    assert judged == ({"replayed"} if name == "none-32" else {"refused", "replayed"})


def judge_damage(path: Path, seed: int) -> str:
    print(f"seed {seed}")
    with opened(path) as disk:
        sound = disk.recover()
        position = damage_one_block(disk, sound, seed)
        replay = disk.recover()
        ours = {home: replay.content(home) or disk.read_home(home) for home in sound.copies}
    try:
        by_kernel = recovered_by_kernel(path)
    except MountRefused:
        used = {source[0] for home in replay.copies if (source := replay.source(home))}
        assert replay.damage or position not in used, "the kernel refuses"
        return "refused"
    assert not replay.damage, "the kernel replays"
    with opened(by_kernel) as disk:
        superblock = 1024 // disk.block_bytes  # every mount writes it
        assert [home for home in ours if home != superblock and disk.read_home(home) != ours[home]] == []
    return "replayed"


def damage_one_block(disk: Disk, sound: Replay, seed: int) -> int:
    """Turn a bit; the first two seeds are one end of the log and one wrong checksum for certain."""
    chance = random.Random(seed)
    transaction = sound.transactions[0] if seed < 2 else chance.choice(sound.transactions)
    descriptors = transaction.descriptors or (transaction.start,)
    copies = sorted(source[0] for home in sound.copies if (source := sound.source(home)))
    position = descriptors[0] if seed < 2 else chance.choice(
        (transaction.start, *descriptors, *transaction.revocations, descriptors[0] + 1, chance.choice(copies)))
    raw = bytearray(disk.read(position))
    raw[(11, 1000)[seed] if seed < 2 else chance.choice((3, 7, 11, 500, 1023))] ^= 1 << chance.randrange(8)
    disk.write(position, bytes(raw))
    return position
