"""The same image through kernel ext4 and through fusewire: every name, attribute, extended attribute, byte and hole.

Images that this kernel cannot mount are compared with what their recipe promises.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import require
from tests.images import CASEFOLD_NAMES, RECIPES, Recipe, expected
from tests.mounting import CHECKOUT, Mount, fusewire_mount, kernel_mount, run, which
from tests.walk import Fields, differences, entries, statfs_fields

ImageOf = Callable[[str], Path]

IGNORED = {
    "attributes": "fs/fuse takes only the basic fields and btime from a STATX reply, so stx_attributes never pass",
}
IGNORED_STATFS = {
    "type": "names the driver: 0xEF53 for ext4, 0x65735546 for FUSE",
    "fsid": "ext4 gives its UUID; FUSE has no field for it in its STATFS reply",
}
IGNORED_FOR_USERS = {
    "flags": "a mount by an ordinary user is always nosuid and nodev",
}
SHOWN = 40

KERNEL = [name for name, recipe in RECIPES.items() if recipe.kernel_mountable]
PROMISED = [name for name, recipe in RECIPES.items() if not recipe.kernel_mountable]
LOOKUPS = ["hash-legacy-signed", "hash-tea-unsigned", "index-2-level", "inode-256", "encrypt-v2"]
SAMPLE = ["inode-256", "ext3", "inline_data-256"]


def fusewire_options(recipe: Recipe) -> str:
    """The options of the kernel's mount mean the same to fusewire."""
    return recipe.kernel_options


@contextmanager
def both(image: Path, recipe: Recipe) -> Iterator[tuple[Path, Path]]:
    """The roots of a kernel mount and of a fusewire mount of one image, together."""
    with kernel_mount(image, recipe.kernel_options) as ours, fusewire_mount(image, fusewire_options(recipe)) as theirs:
        yield ours.root, theirs.root


def assert_same(left: list[tuple[str, Fields]], right: list[tuple[str, Fields]], ignored: dict[str, str]) -> None:
    found = differences(left, right, ignored)
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:SHOWN])


def statfs_difference(left: Path, right: Path, ignored: dict[str, str]) -> list[str]:
    return differences([("statfs", statfs_fields(left))], [("statfs", statfs_fields(right))], ignored)


def assert_quiet(mounted: Mount) -> None:
    """The daemon had nothing to complain about."""
    assert "Traceback" not in mounted.log_text(), mounted.log_text()


# --- whole trees ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNEL)
def test_same_tree_as_kernel(name: str, image_of: ImageOf) -> None:
    recipe, image = RECIPES[name], image_of(name)
    with kernel_mount(image, recipe.kernel_options) as mounted:
        wanted = [*entries(mounted.root), ("statfs", statfs_fields(mounted.root))]
    assert len(wanted) > 4, "the recipe made an empty tree"
    with fusewire_mount(image, fusewire_options(recipe)) as mounted:
        found = [*entries(mounted.root), ("statfs", statfs_fields(mounted.root))]
        assert_quiet(mounted)
    assert_same(wanted, found, IGNORED | IGNORED_STATFS)


@pytest.mark.parametrize("name", PROMISED)
def test_same_tree_as_promised(name: str, image_of: ImageOf) -> None:
    image = image_of(name)
    wanted = expected(image)
    assert wanted
    with fusewire_mount(image) as mounted:
        tree = dict(entries(mounted.root))
        assert_quiet(mounted)
    present = [(path, {key: tree[path].get(key, "-") for key in fields}) for path, fields in wanted if path in tree]
    assert_same(wanted, present, {})
    if not name.startswith("verity"):
        made = {path for path, _ in wanted}
        extra = {path for path in tree if not path.endswith("/") and path != "." and "lost+found" not in path} - made
        assert not extra


@pytest.mark.parametrize("name", ["inode-256", "no-sparse_super", "bigalloc-16k", "external-journal", "block-1k"])
def test_minixdf(name: str, image_of: ImageOf) -> None:
    image, options = image_of(name), RECIPES[name].kernel_options + ",minixdf"
    with kernel_mount(image, options) as ours, fusewire_mount(image, options) as theirs:
        assert not statfs_difference(ours.root, theirs.root, IGNORED_STATFS)


@pytest.mark.parametrize("name", SAMPLE)
def test_same_tree_without_loop_device(name: str, image_of: ImageOf) -> None:
    image = image_of(name)
    with kernel_mount(image) as ours, fusewire_mount(image, "ro,noatime,noloop") as theirs:
        assert_same(list(entries(ours.root)), list(entries(theirs.root)), IGNORED)
        assert not statfs_difference(ours.root, theirs.root, IGNORED_STATFS)


# --- an ordinary user -------------------------------------------------------------------------------------------------

USER_ID = 1000
AS_USER = ("setpriv", f"--reuid={USER_ID}", f"--regid={USER_ID}", "--clear-groups", "--pdeathsig=KILL")


def fuse_for_everyone(folder: Path) -> None:
    """Put a /dev/fuse that all may open (as udev makes it) into this process's mount namespace."""
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        node = folder / "fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
        os.chmod(node, 0o666)
        run("mount", "--bind", node, "/dev/fuse")


def walk_as_user(root: Path) -> dict[str, str]:
    """The walk by the ordinary user: each line by its path."""
    command = [*AS_USER, sys.executable, "-m", "tests.walk", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return dict(text.split("\t", 1) for text in done.stdout.splitlines())


def without(ignored: dict[str, str], lines: dict[str, str]) -> dict[str, list[str]]:
    return {
        path: [field for field in text.split("\t") if field.split("=")[0] not in ignored]
        for path, text in lines.items()
        if path != "statfs"
    }


@pytest.mark.parametrize("name", SAMPLE)
def test_same_tree_for_an_ordinary_user(name: str, image_of: ImageOf, tmp_path: Path) -> None:
    """The user mounts an image of their own and sees of it what the kernel's mount would show that user."""
    require([f"the program {name}" for name in ("setpriv", "fusermount3") if not which(name)])
    fuse_for_everyone(tmp_path)
    image = image_of(name)
    os.chmod(image, 0o444)
    for parent in image.parents[:-2]:
        os.chmod(parent, os.stat(parent).st_mode | 0o011)
    with kernel_mount(image) as ours:
        wanted = without(IGNORED, walk_as_user(ours.root))
    with fusewire_mount(image, "ro,noatime", prefix=AS_USER) as theirs:
        found = without(IGNORED, walk_as_user(theirs.root))
        assert_quiet(theirs)
    assert wanted == found


# --- single questions -------------------------------------------------------------------------------------------------


def random_names(random_source: random.Random, present: list[bytes]) -> Iterator[bytes]:
    """Names that are absent, nearly present, too long, and odd."""
    for _ in range(60):
        name = bytearray(random_source.choice(present))
        yield bytes(name) + b"x"
        yield bytes(name[:-1]) or b"x"
        name[random_source.randrange(len(name))] ^= 0x20
        yield bytes(name).replace(b"/", b"_").replace(b"\0", b"_")
        yield random_source.randbytes(random_source.randrange(1, 300)).replace(b"/", b"_").replace(b"\0", b"_")
    yield from (b"n" * 255, b"n" * 256, b"n" * 4000, b".", b"..", b"...")


def lookup(directory: bytes, name: bytes) -> str:
    try:
        return str(os.lstat(directory + b"/" + name).st_ino)
    except OSError as error:
        return errno.errorcode[error.errno or 0]


@pytest.mark.parametrize(
    "name", ["hash-legacy-signed", "hash-tea-unsigned", "index-2-level", "inode-256", "encrypt-v2"]
)
def test_random_lookups(name: str, image_of: ImageOf) -> None:
    seed = int(os.environ.get("FUSEWIRE_SEED", "20240229"))
    print(f"FUSEWIRE_SEED={seed}")
    random_source = random.Random(seed)
    recipe = RECIPES[name]
    with both(image_of(name), recipe) as (ours, theirs):
        for path, directories, files in os.walk(os.fsencode(ours)):
            below = path[len(os.fsencode(ours)) :]
            if not (directories + files) or len(path) > 3000:
                continue
            for wanted in random_names(random_source, directories + files):
                here, there = lookup(path, wanted), lookup(os.fsencode(theirs) + below, wanted)
                outside = below == b"" and wanted == b".."
                assert outside or here == there, (below, wanted)


@pytest.mark.parametrize("name", ["inode-256", "inline_data-256"])
def test_parent_walks(name: str, image_of: ImageOf) -> None:
    with both(image_of(name), RECIPES[name]) as (ours, theirs):
        for path in ("dirs/a/b/../../empty/..", "dirs/a/b/c/d/e/f/g/h/i/j/../../../..", "links/../dirs/many/.."):
            assert os.stat(ours / path).st_ino == os.stat(theirs / path).st_ino
        here = os.open(theirs / "dirs/a/b/c/d/e/f/g/h/i/j", os.O_RDONLY)
        try:
            for level in range(11):
                up = "/".join([".."] * level) or "."
                deepest = ours / "dirs/a/b/c/d/e/f/g/h/i/j"
                assert os.stat(up, dir_fd=here).st_ino == os.stat(deepest / up).st_ino
        finally:
            os.close(here)


def test_many_readers_at_once(image_of: ImageOf) -> None:
    """Sixteen threads read the tree in orders of their own and all see the kernel's."""
    with both(image_of("inode-256"), RECIPES["inode-256"]) as (ours, theirs):
        wanted = [path for path, fields in entries(ours) if "data" in fields and "names/" not in path]
        digests = {path: (ours / path[1:]).read_bytes()[: 1 << 20] for path in wanted if "far" not in path}

        def read_all(seed: int) -> list[str]:
            order = random.Random(seed).sample(sorted(digests), len(digests))
            return [path for path in order if read_start(theirs / path[1:]) != digests[path]]

        with ThreadPoolExecutor(16) as pool:
            assert [bad for bad in pool.map(read_all, range(16)) if bad] == []


def read_start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1 << 20)


# --- casefolded directories -------------------------------------------------------------------------------------------


def test_casefold_lookups(image_of: ImageOf) -> None:
    """Any case and any normal form finds the name; the name itself is kept; a folded name is no second file."""
    with fusewire_mount(image_of("casefold")) as mounted:
        here = mounted.root / "casefold"
        assert set(CASEFOLD_NAMES) <= set(os.listdir(here))
        for name in CASEFOLD_NAMES:
            inode = os.stat(here / name).st_ino
            variants = {name.upper(), name.lower(), name.swapcase(), name.casefold()}
            variants |= {unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in set(variants)}
            for variant in variants:
                assert os.stat(here / variant).st_ino == inode, variant
        for index in range(0, 400, 7):
            wanted = mounted.root / "casefold-large" / f"NAME-{index:03}-\u00e4\u00f6\u00fc"
            assert wanted.read_bytes() == b"%d" % index
        for absent in ("fil", "File ", "strase", "NAME-400-\u00e4\u00f6\u00fc"):
            assert not (here / absent).exists()
        assert os.path.exists(os.fsencode(here) + b"/bad-\xff-UTF8")
        assert not os.path.exists(os.fsencode(here) + b"/BAD-\xff-UTF8")
        assert not (mounted.root / "SIZES").exists()


# --- the walker itself ------------------------------------------------------------------------------------------------

CHANGES = {
    "mode": "sif /sizes/100 mode 0100600",
    "uid": "sif /sizes/100 uid 12345",
    "mtime": "sif /sizes/100 mtime 20010101",
    "size": "sif /sizes/100 size 99",
    "nlink": "sif /sizes/100 links_count 2",
    "generation": "sif /sizes/100 generation 77",
    "flags": "sif /sizes/100 flags 0x80040",
    "xattrs": "ea_set /sizes/100 user.new value",
    "missing": "unlink /sizes/100",
    "unexpected": "symlink /sizes/new target",
    "target": "sif /links/to-59 block[0] 0x41414141",
    "map": "punch /sizes/150001 3 5",
}


@pytest.mark.parametrize("change", CHANGES)
def test_walker_sees(change: str, image_of: ImageOf, tmp_path: Path) -> None:
    """Kernel ext4 on both sides: the same image gives no difference, a changed one gives that difference."""
    image = image_of("no-csum")
    other = tmp_path / "changed.img"
    subprocess.run(["cp", "--sparse=always", image, other], check=True)
    subprocess.run(["debugfs", "-w", "-R", CHANGES[change], other], check=True, capture_output=True)
    with kernel_mount(image) as left:
        wanted = list(entries(left.root))
    with kernel_mount(image) as again:
        assert not differences(wanted, entries(again.root), {})
    with kernel_mount(other) as right:
        found = differences(wanted, entries(right.root), {})
    assert any(f"{change}: " in text for text in found), found
