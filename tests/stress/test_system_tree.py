"""A tree like that of a small system, unpacked and removed: this machine's own files, with links, devices, attributes.

FUSEWIRE_STRESS_SECONDS takes all of /usr/share and /usr/lib; without it a few thousand files do.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tests import populate
from tests.images import mke2fs
from tests.model.run import fsck
from tests.mount.test_programs import assert_copied, programs, run
from tests.mounting import fusewire_mount, kernel_mount

LONG = bool(os.environ.get("FUSEWIRE_STRESS_SECONDS"))
FILES_MOST = 1 << 30 if LONG else 700
FILE_MOST_BYTES = 1 << 40 if LONG else 100_000
SIZE = 12 << 30 if LONG else 256 << 20
SOURCES = ("usr/share", "usr/lib")
KEPT = ("--xattrs", "--xattrs-include=*", "--acls", "--numeric-owner", "--sparse")


def names(folder: str) -> Iterator[bytes]:
    """What is below a directory of this machine, directories before what is in them."""
    for path, folders, files in os.walk(b"/" + os.fsencode(folder)):
        for name in (*folders, *files):
            full = path + b"/" + name
            if name in folders or os.lstat(full).st_size <= FILE_MOST_BYTES:
                yield full[1:]


def archive(path: Path, kinds: Path) -> None:
    """A tar of this machine's files, and of every kind of file there is, which ``kinds`` then holds."""
    kinds.mkdir()
    for write in (*populate.ORDINARY, populate.xattrs, populate.acls):
        write(kinds)
    (kinds / "holes" / "far").unlink()      # tar reads it for minutes
    (kinds / "special" / "socket").unlink()
    chosen = [name for folder in SOURCES for name in islice(names(folder), FILES_MOST)]
    subprocess.run(["tar", "-cf", path, *KEPT, "--no-recursion", "--null", "-C", "/", "-T", "-"],
                   input=b"\0".join(chosen), check=True)
    run("tar", "-rf", path, *KEPT, "-C", kinds.parent, kinds.name)


def test_a_system_is_unpacked_and_removed(mounts: None, tmp_path: Path) -> None:
    programs("tar", "rsync")
    tar, kinds, image = tmp_path / "tree.tar", tmp_path / "kinds", tmp_path / "image"
    archive(tar, kinds)
    mke2fs(image, "-t ext4 -b 4096", SIZE)
    with fusewire_mount(image, "rw,noatime") as mount:
        before = os.statvfs(mount.root)
        tree = mount.root / "tree"
        tree.mkdir()
        run("tar", "-xpf", tar, *KEPT, "-C", tree)
        run("tar", "-df", tar, "-C", tree)
        assert_copied(kinds, tree / "kinds")
        assert '"error"' not in mount.log_text(), mount.log_text()
    assert not fsck(image), fsck(image)
    with kernel_mount(image) as mount:
        run("tar", "-df", tar, "-C", mount.root / "tree")
        assert_copied(kinds, mount.root / "tree" / "kinds")
    with fusewire_mount(image, "rw,noatime") as mount:
        run("rm", "-rf", mount.root / "tree")
        os.sync()
        after = os.statvfs(mount.root)
        assert (after.f_bfree, after.f_ffree) == (before.f_bfree, before.f_ffree)
    assert not fsck(image), fsck(image)
