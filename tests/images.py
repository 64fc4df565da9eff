"""Recipes for test images: one for every feature that the ext4 of Linux 6.18 can read.

Most images are formatted by mke2fs and filled by the kernel's own ext4, which is the oracle for them as well. Where
this kernel has no say (blocks above the page size, casefold, verity) the recipe writes beside the image what a mount
must show: `expected` reads it. Images are sparse, small, clean, and made when first asked for.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests import encrypted, populate, verity_image
from tests.mounting import kernel_mount, run, which
from tests.populate import ORDINARY, Populate
from tests.walk import Fields, entries

UUID = "11223344-5566-7788-99aa-bbccddeeff00"
HASH_SEED = "00112233-4455-6677-8899-aabbccddeeff"
MIB = 1 << 20

# What survives mke2fs -d: not times below seconds, flags, inode numbers, nor where blocks lie.
COPIED_FIELDS = ("mode", "uid", "gid", "size", "rdev", "xattrs", "acl_access", "acl_default", "target", "data")

SUBJECTS: tuple[Populate, ...] = (*ORDINARY, populate.xattrs, populate.acls, populate.inode_flags)
EXTENT_SUBJECTS: tuple[Populate, ...] = (*SUBJECTS, populate.preallocated)


@dataclass(frozen=True)
class Recipe:
    """One image: how it is made, who knows what it holds, and what making it needs."""

    name: str
    build: Callable[[Path], None]
    kernel_mountable: bool = True
    kernel_options: str = "ro,noatime"
    programs: tuple[str, ...] = ("mke2fs", "debugfs", "e2fsck")

    def make(self, path: Path) -> None:
        """Write the image to ``path``, and what `expected` reads beside it."""
        self.build(path)

    def missing(self) -> list[str]:
        """The programs that this machine lacks."""
        return [f"the program {name}" for name in self.programs if not which(name)]


def make_cached(recipe: Recipe, folder: Path) -> Path:
    """The image of ``recipe`` in ``folder``, made unless it is there."""
    path = folder / f"{recipe.name}.img"
    if not path.exists():
        unfinished = folder / f"{recipe.name}.new"
        unfinished.unlink(missing_ok=True)
        recipe.make(unfinished)
        for made in folder.glob(f"{recipe.name}.new*"):
            made.rename(folder / made.name.replace(".new", ".img", 1))
    return path


def expected(image: Path) -> list[tuple[str, Fields]]:
    """The entries that a recipe without the kernel promises, with the fields that it knows."""
    stored = json.loads(Path(f"{image}.json").read_text())
    return [(path, fields) for path, fields in stored]


def promise(image: Path, shown: Iterable[tuple[str, Fields]]) -> None:
    """Store what a mount of ``image`` must show."""
    Path(f"{image}.json").write_text(json.dumps(list(shown)))


# --- building blocks --------------------------------------------------------------------------------------------------


def mke2fs(path: Path, arguments: str, size: int) -> None:
    """Format a new sparse file of ``size`` bytes."""
    with open(path, "wb") as file:
        file.truncate(size)
    extended = [word for word in ("-E", f"hash_seed={HASH_SEED}") if "-E" not in arguments.split()]
    run("mke2fs", "-q", "-F", "-U", UUID, *extended, *arguments.split(), path, env=tools_environment())


def tools_environment() -> dict[str, str]:
    """Debian's own mke2fs.conf would decide features; an absent one leaves the built-in defaults of ext4 types."""
    return os.environ | {"PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


def debugfs(path: Path, commands: Iterable[str]) -> None:
    """Run debugfs ``commands`` on the image; they must not complain."""
    with tempfile.NamedTemporaryFile("w", prefix="fusewire-debugfs-") as script:
        script.write("\n".join(commands) + "\n")
        script.flush()
        done = run("debugfs", "-w", "-f", script.name, path, env=tools_environment())
    complaints = [text for text in done.stderr.splitlines() if text and not text.startswith("debugfs ")]
    if complaints:
        raise RuntimeError(f"debugfs {path}: {complaints}")


def fill(path: Path, contents: Iterable[Populate]) -> None:
    """Mount ``path`` writable with the kernel and write ``contents`` into it."""
    with kernel_mount(path, "rw,noatime") as mounted:
        for write in contents:
            write(mounted.root)


def kernel(
    name: str,
    arguments: str,
    *contents: Populate,
    size: int = 32 * MIB,
    prepare: tuple[str, ...] = (),
    finish: tuple[str, ...] = (),
    options: str = "ro,noatime",
) -> Recipe:
    """A recipe: mke2fs ``arguments``, debugfs ``prepare``, the kernel writes ``contents``, debugfs ``finish``."""

    def build(path: Path) -> None:
        mke2fs(path, arguments, size)
        if prepare:
            debugfs(path, prepare)
        fill(path, contents)
        if finish:
            debugfs(path, finish)

    return Recipe(name, build, kernel_options=options)


@contextmanager
def source_tree(contents: Iterable[Populate]) -> Iterator[Path]:
    """A directory with ``contents`` on a temporary ext4, to copy from."""
    with tempfile.TemporaryDirectory(prefix="fusewire-source-") as folder:
        image = Path(folder) / "source.img"
        mke2fs(image, "-t ext4 -m 0", 64 * MIB)
        fill(image, contents)
        with kernel_mount(image) as mounted:
            yield mounted.root


def copied(
    name: str, arguments: str, contents: tuple[Populate, ...], size: int, finish: tuple[str, ...] = ()
) -> Recipe:
    """A recipe for what this kernel cannot mount: mke2fs copies a tree, whose walk is what a mount must show."""

    def build(path: Path) -> None:
        with source_tree(contents) as source:
            mke2fs(path, f"{arguments} -d {source}", size)
            promise(
                path, [(shown, kept) for shown, fields in entries(source) if (kept := copied_fields(shown, fields))]
            )
        if finish:
            debugfs(path, finish)
            check(path)

    return Recipe(name, build, kernel_mountable=False)


def copied_fields(path: str, fields: Fields) -> Fields:
    """The fields that a copy must have too; directories differ in size with the block size."""
    kind = stat.S_IFMT(int(fields.get("mode", "0"), 8))
    kept = {key: fields[key] for key in COPIED_FIELDS if key in fields and (kind, key) != (stat.S_IFDIR, "size")}
    if kind == stat.S_IFREG:  # mke2fs makes two files of a symbolic link with two names
        kept["nlink"] = fields["nlink"]
    return kept if "lost+found" not in path and path != "." else {}


def check(path: Path) -> None:
    """Let e2fsck rebuild the directory indexes, and be content."""
    run("e2fsck", "-fyD", path, check=False, env=tools_environment())
    run("e2fsck", "-fn", path, env=tools_environment())


# --- the recipes ------------------------------------------------------------------------------------------------------


def sizes() -> Iterator[Recipe]:
    """Block and inode sizes."""
    for kib in (1, 2, 4):
        yield kernel(f"block-{kib}k", f"-t ext4 -b {kib * 1024}", *EXTENT_SUBJECTS)
    for kib in (8, 16, 32, 64):
        contents = (*ORDINARY[:-1], populate.xattrs, populate.acls)
        yield copied(f"block-{kib}k", f"-t ext4 -b {kib * 1024} -O ^has_journal", contents, kib * 4 * MIB)
    for inode in (128, 256, 512, 1024):
        yield kernel(f"inode-{inode}", f"-t ext4 -I {inode}", *EXTENT_SUBJECTS)
    yield kernel("inode-4096", "-t ext4 -b 4096 -I 4096 -N 600", *EXTENT_SUBJECTS)
    yield kernel("inode-1024-block-1k", "-t ext4 -b 1024 -I 1024", *EXTENT_SUBJECTS)


def generations() -> Iterator[Recipe]:
    """ext2 and ext3, revision 0, and file systems without this or that early feature."""
    indirect = (*SUBJECTS, populate.indirect_edges)
    for kib in (1, 2, 4):
        yield kernel(f"ext2-{kib}k", f"-t ext2 -b {kib * 1024}", *indirect)
    yield kernel("ext3", "-t ext3", *indirect, populate.hashed(500))
    yield kernel("ext3-1k-inode-256", "-t ext3 -b 1024 -I 256", *indirect)
    yield kernel("revision-0", "-t ext2 -r 0 -b 1024 -O none -I 128", *ORDINARY[:-1])
    yield kernel("features-none", "-t ext4 -O none -b 1024", *ORDINARY, populate.xattrs, populate.indirect_edges)
    for feature in ("filetype", "ext_attr", "dir_index", "extra_isize", "has_journal", "resize_inode", "huge_file"):
        subjects = ORDINARY if feature == "ext_attr" else SUBJECTS
        yield kernel(f"no-{feature}", f"-t ext4 -O ^{feature}", *subjects, populate.hashed(200))
    yield kernel("no-dir_nlink", "-t ext4 -O ^dir_nlink,^large_file", *SUBJECTS)
    yield kernel("no-extent", "-t ext4 -O ^extent,^64bit", *indirect)


def geometry() -> Iterator[Recipe]:
    """Where the metadata lies: descriptor sizes, group layouts, clusters."""
    groups = (*ORDINARY, populate.spread(40))
    small_groups = "-b 1024 -g 1024"
    layouts = {
        "64bit": "-O 64bit",
        "no-64bit": "-O ^64bit,^metadata_csum",
        "meta_bg": "-O meta_bg,^resize_inode",
        "meta_bg-no-64bit": "-O meta_bg,^resize_inode,^64bit",
        "no-flex_bg": "-O ^flex_bg",
        "flex_bg-4": "-G 4",
        "flex_bg-64": "-G 64",
        "no-sparse_super": "-O ^sparse_super,^resize_inode",
        "sparse_super2": "-O sparse_super2,^resize_inode",
        "packed-meta": "-E packed_meta_blocks=1",
        "mmp": "-O mmp",
        "stable_inodes": "-O stable_inodes",
        "few-inodes-per-group": "-N 4096 -O ^flex_bg",
    }
    for name, arguments in layouts.items():
        yield kernel(name, f"-t ext4 {small_groups} {arguments}", *groups)
    for name, arguments in {"bigalloc-16k": "-C 16384", "bigalloc-1k-64k": "-b 1024 -C 65536"}.items():
        yield kernel(
            name, f"-t ext4 -O bigalloc {arguments}", *EXTENT_SUBJECTS, populate.fragmented(300), size=128 * MIB
        )
    yield kernel("group-desc-128", "-t ext4 -O 64bit -E desc_size=128", *groups)
    yield Recipe("external-journal", external_journal, kernel_options="ro,noatime,noload")


def extents() -> Iterator[Recipe]:
    """Extent trees of each depth, and files of the largest sizes."""
    trees = [populate.fragmented(count) for count in (1, 4, 5, 84, 300, 340, 1000)]
    yield kernel("extents", "-t ext4 -b 1024", *trees, populate.preallocated, populate.holes)
    yield kernel("extents-4k", "-t ext4 -b 4096", populate.fragmented(1500), populate.preallocated)
    yield kernel("extents-depth-3", "-t ext4 -b 1024 -m 0", populate.fragmented(30_000), size=64 * MIB)
    yield kernel("extents-no-csum", "-t ext4 -b 1024 -O ^metadata_csum,^64bit", *trees)
    yield kernel("largest-file", "-t ext4", populate.largest_file)
    yield kernel("largest-file-1k", "-t ext4 -b 1024", populate.largest_file)
    yield kernel("deep-directories", "-t ext4 -b 1024", populate.deep_directories)


def checksums() -> Iterator[Recipe]:
    """Every kind of metadata checksum, and none."""
    contents = (*EXTENT_SUBJECTS, populate.hashed(400))
    choices = {
        "metadata_csum": "-O metadata_csum",
        "metadata_csum_seed": "-O metadata_csum,metadata_csum_seed",
        "uninit_bg": "-O ^metadata_csum,uninit_bg",
        "uninit_bg-no-64bit": "-O ^metadata_csum,uninit_bg,^64bit",
        "no-csum": "-O ^metadata_csum,^uninit_bg",
    }
    for name, arguments in choices.items():
        changed = ("ssv uuid random",) if name == "metadata_csum_seed" else ()
        yield kernel(name, f"-t ext4 -b 1024 {arguments}", *contents, finish=changed)


def directory_indexes() -> Iterator[Recipe]:
    """Hash versions, signedness, and the depth of the index."""
    for version in ("legacy", "half_md4", "tea"):
        for sign, flag in {"signed": 1, "unsigned": 2}.items():
            prepare = (f"ssv def_hash_version {version}", f"ssv flags {flag}")
            yield kernel(f"hash-{version}-{sign}", "-t ext4 -b 1024", populate.hashed(600), prepare=prepare)
    yield kernel("index-1-level", "-t ext4 -b 4096", populate.hashed(2000, 20))
    yield kernel("index-2-level", "-t ext4 -b 1024", populate.hashed(3000, 60))
    yield kernel("index-3-level", "-t ext4 -b 1024 -O large_dir", populate.hashed(36_000, 255), size=96 * MIB)
    yield kernel("large_dir", "-t ext4 -O large_dir", *ORDINARY)
    yield kernel("dir_nlink", "-t ext4", populate.directories, finish=("sif /dirs links_count 1",))


def attributes() -> Iterator[Recipe]:
    """Extended attributes, inline data, project ids, quota, and other per-inode features."""
    for inode in (256, 1024):
        contents = (*EXTENT_SUBJECTS, populate.inline_data)
        yield kernel(f"inline_data-{inode}", f"-t ext4 -O inline_data -I {inode}", *contents)
    yield kernel("inline_data-1k", "-t ext4 -b 1024 -O inline_data", *EXTENT_SUBJECTS, populate.inline_data)
    yield kernel("inline_data-no-csum", "-t ext4 -O inline_data,^metadata_csum", populate.inline_data, populate.xattrs)
    yield kernel("ea_inode", "-t ext4 -O ea_inode", populate.xattrs, populate.ea_inodes)
    yield kernel("ea_inode-1k", "-t ext4 -b 1024 -O ea_inode,^metadata_csum", populate.xattrs, populate.ea_inodes)
    for name, arguments in {"project": "-O project", "quota": "-O quota -Q usrquota,grpquota,prjquota"}.items():
        yield Recipe(name, partial(with_projects, features=arguments))
    yield kernel("inode-flags", "-t ext4", populate.inode_flags, finish=("sif /flags/notail flags 0x8c000",))
    yield kernel("orphan_file", "-t ext4 -O orphan_file", *ORDINARY)
    yield kernel("fast_commit", "-t ext4 -O fast_commit", *ORDINARY)


def policies() -> Iterator[Recipe]:
    """Encryption, verity, casefold."""
    for version in (1, 2):
        yield Recipe(f"encrypt-v{version}", partial(encrypted_image, version=version))
    yield Recipe("verity", partial(verity, corrupt=False), kernel_mountable=False)
    yield Recipe("verity-corrupt", partial(verity, corrupt=True), kernel_mountable=False)
    flags = tuple(f"sif /{name} flags 0x40080000" for name in ("casefold", "casefold-large"))
    casefold = "-t ext4 -b 1024 -O casefold -E encoding=utf8"
    yield copied("casefold", casefold, (casefold_names, populate.plain_files), 32 * MIB, flags)


def with_projects(path: Path, features: str) -> None:
    """Project ids and quota inodes are added after filling: this kernel writes no file system that has them."""
    mke2fs(path, "-t ext4", 32 * MIB)
    fill(path, (*ORDINARY, populate.project_files))
    run("tune2fs", "-O", "project", path, env=tools_environment())
    commands = [f"sif /projects/p{project} projid {project}" for project in populate.PROJECTS]
    commands += ["sif /projects/inherit projid 4711", "sif /projects/inherit flags 0x20080000"]
    debugfs(path, [*commands, "sif /projects/inherit/child projid 4711"])
    run("tune2fs", *features.split(), path, env=tools_environment())


def external_journal(path: Path) -> None:
    """An image whose (clean) journal is on a device that is no longer there."""
    with tempfile.NamedTemporaryFile(prefix="fusewire-journal-") as journal:
        mke2fs(Path(journal.name), "-O journal_dev -b 4096", 8 * MIB)
        device = run("losetup", "-f", "--show", journal.name).stdout.strip()
        try:
            mke2fs(path, f"-t ext4 -b 4096 -J device={device}", 32 * MIB)
            fill(path, ORDINARY)
        finally:
            run("losetup", "-d", device)


def encrypted_image(path: Path, version: int) -> None:
    """Directories under an encryption policy, written with the key, which the next mount does not have."""
    mke2fs(path, "-t ext4 -b 4096 -O encrypt,stable_inodes", 32 * MIB)
    fill(path, (lambda root: encrypted.write_tree(root, version), populate.plain_files))


def verity(path: Path, corrupt: bool) -> None:
    """Verity files; ``corrupt``: one byte of the data of each is not what its tree says."""
    mke2fs(path, "-t ext4 -b 4096 -O verity", 32 * MIB)  # the blocks of the files' trees and descriptors
    shown = verity_image.add_files(path, corrupt, debugfs)
    promise(path, shown)


CASEFOLD_NAMES = (
    "File",
    "MIXED.Case",
    "stra\u00dfe",
    "\u00c5ngstr\u00f6m",
    "e\u0301te\u0301",
    "\u03a3\u03af\u03c3\u03c5\u03c6\u03bf\u03c2",
)


def casefold_names(root: Path) -> None:
    """Two directories that the recipe marks casefolded: a small one, and one long enough for an index."""
    small = populate.folder(root, "casefold")
    for name in CASEFOLD_NAMES:
        (small / name).write_bytes(name.encode())
    with open(os.fsencode(small) + b"/bad-\xff-UTF8", "wb") as file:
        file.write(b"not UTF-8")
    large = populate.folder(root, "casefold-large")
    for index in range(400):
        (large / f"Name-{index:03}-\u00c4\u00d6\u00dc").write_bytes(b"%d" % index)


def all_recipes() -> dict[str, Recipe]:
    """Every recipe by its name; names are unique."""
    groups = (sizes, generations, geometry, extents, checksums, directory_indexes, attributes, policies)
    recipes = [recipe for group in groups for recipe in group()]
    by_name = {recipe.name: recipe for recipe in recipes}
    if len(by_name) != len(recipes):
        raise ValueError("two recipes have one name")
    return by_name


RECIPES = all_recipes()


def main() -> None:
    """Make the images named on the command line (or all) in the current directory, and say how long each took."""
    import sys  # noqa: PLC0415 - only for the command
    import time  # noqa: PLC0415

    for name in sys.argv[1:] or RECIPES:
        start = time.monotonic()
        try:
            make_cached(RECIPES[name], Path.cwd())
            outcome = "made"
        except Exception as error:
            outcome = f"FAILED {error}"
        print(f"{time.monotonic() - start:6.2f} s  {name}: {outcome}", flush=True)


if __name__ == "__main__":
    main()
