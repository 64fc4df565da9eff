"""The feature flags of ext4 as one table: what each is called, where its bit is, and what fusewire does with it.

Mount policy, error texts and the README's list come from here.  Names are mke2fs's.
Source: kernel documentation, ext4, "The Super Block" (s_feature_compat, s_feature_incompat, s_feature_ro_compat).
"""

from enum import Enum
from typing import NamedTuple

from .errors import Unsupported


class Policy(Enum):
    """WRITE: can be read and written; READ: a file system that has it is read-only; REFUSE: it cannot be served."""

    WRITE = "write"
    READ = "read"
    REFUSE = "refuse"


class Row(NamedTuple):
    """One feature: its name in mke2fs, its bit, the word it stands in, and what we do with it."""

    title: str
    mask: int
    group: str  # compat, ro_compat or incompat
    policy: Policy


class Feature(Row, Enum):
    """Every feature that has a name; unknown compat bits are harmless, the other unknown bits decide the mount."""

    __hash__ = object.__hash__  # members are unique; asking a set for one is on every operation's way

    DIR_PREALLOC = ("dir_prealloc", 0x1, "compat", Policy.WRITE)
    IMAGIC_INODES = ("imagic_inodes", 0x2, "compat", Policy.READ)
    HAS_JOURNAL = ("has_journal", 0x4, "compat", Policy.WRITE)
    EXT_ATTR = ("ext_attr", 0x8, "compat", Policy.WRITE)
    RESIZE_INODE = ("resize_inode", 0x10, "compat", Policy.WRITE)
    DIR_INDEX = ("dir_index", 0x20, "compat", Policy.WRITE)
    LAZY_BG = ("lazy_bg", 0x40, "compat", Policy.WRITE)
    EXCLUDE_BITMAP = ("snapshot_bitmap", 0x100, "compat", Policy.READ)
    SPARSE_SUPER2 = ("sparse_super2", 0x200, "compat", Policy.WRITE)
    FAST_COMMIT = ("fast_commit", 0x400, "compat", Policy.WRITE)
    STABLE_INODES = ("stable_inodes", 0x800, "compat", Policy.WRITE)
    ORPHAN_FILE = ("orphan_file", 0x1000, "compat", Policy.WRITE)

    SPARSE_SUPER = ("sparse_super", 0x1, "ro_compat", Policy.WRITE)
    LARGE_FILE = ("large_file", 0x2, "ro_compat", Policy.WRITE)
    BTREE_DIR = ("btree_dir", 0x4, "ro_compat", Policy.READ)
    HUGE_FILE = ("huge_file", 0x8, "ro_compat", Policy.WRITE)
    GDT_CSUM = ("uninit_bg", 0x10, "ro_compat", Policy.WRITE)
    DIR_NLINK = ("dir_nlink", 0x20, "ro_compat", Policy.WRITE)
    EXTRA_ISIZE = ("extra_isize", 0x40, "ro_compat", Policy.WRITE)
    HAS_SNAPSHOT = ("has_snapshot", 0x80, "ro_compat", Policy.READ)
    QUOTA = ("quota", 0x100, "ro_compat", Policy.READ)
    BIGALLOC = ("bigalloc", 0x200, "ro_compat", Policy.READ)
    METADATA_CSUM = ("metadata_csum", 0x400, "ro_compat", Policy.WRITE)
    REPLICA = ("replica", 0x800, "ro_compat", Policy.READ)
    READONLY = ("read-only", 0x1000, "ro_compat", Policy.READ)
    PROJECT = ("project", 0x2000, "ro_compat", Policy.READ)
    SHARED_BLOCKS = ("shared_blocks", 0x4000, "ro_compat", Policy.READ)
    VERITY = ("verity", 0x8000, "ro_compat", Policy.READ)
    ORPHAN_PRESENT = ("orphan_present", 0x10000, "ro_compat", Policy.WRITE)

    COMPRESSION = ("compression", 0x1, "incompat", Policy.REFUSE)
    FILETYPE = ("filetype", 0x2, "incompat", Policy.WRITE)
    RECOVER = ("needs_recovery", 0x4, "incompat", Policy.WRITE)
    JOURNAL_DEV = ("journal_dev", 0x8, "incompat", Policy.REFUSE)
    META_BG = ("meta_bg", 0x10, "incompat", Policy.WRITE)
    EXTENTS = ("extent", 0x40, "incompat", Policy.WRITE)
    BIT64 = ("64bit", 0x80, "incompat", Policy.WRITE)
    MMP = ("mmp", 0x100, "incompat", Policy.READ)
    FLEX_BG = ("flex_bg", 0x200, "incompat", Policy.WRITE)
    EA_INODE = ("ea_inode", 0x400, "incompat", Policy.READ)
    DIRDATA = ("dirdata", 0x1000, "incompat", Policy.REFUSE)
    CSUM_SEED = ("metadata_csum_seed", 0x2000, "incompat", Policy.WRITE)
    LARGE_DIR = ("large_dir", 0x4000, "incompat", Policy.WRITE)
    INLINE_DATA = ("inline_data", 0x8000, "incompat", Policy.READ)
    ENCRYPT = ("encrypt", 0x10000, "incompat", Policy.READ)
    CASEFOLD = ("casefold", 0x20000, "incompat", Policy.READ)


_GROUPS = ("compat", "ro_compat", "incompat")


class FeatureSet:
    """The three feature words of one superblock, asked by member: ``Feature.BIT64 in features``."""

    __slots__ = ("_known", "words")

    def __init__(self, compat: int, ro_compat: int, incompat: int) -> None:
        self.words = {"compat": compat, "ro_compat": ro_compat, "incompat": incompat}
        self._known = frozenset(feature for feature in Feature if self.words[feature.group] & feature.mask)

    def __contains__(self, feature: Feature) -> bool:
        return feature in self._known

    def names(self) -> list[str]:
        """All set features by name, in the order of the table; unknown bits as ``FEATURE_I31`` and the like."""
        return [feature.title for feature in Feature if feature in self._known] + [
            name for group in _GROUPS for name in self._unknown(group)]

    def refuse_what_cannot_be_read(self) -> None:
        """Raise ``Unsupported`` naming every incompatible feature that keeps the file system from being read."""
        refused = [feature.title for feature in self._known if feature.policy is Policy.REFUSE]
        names = refused + self._unknown("incompat")
        if names:
            raise Unsupported(f"unsupported feature: {', '.join(sorted(names))}")

    def keep_from_writing(self) -> list[str]:
        """The names of the features that make a file system read-only here; empty if it can be written."""
        known = [feature.title for feature in Feature if feature in self._known and feature.policy is not Policy.WRITE
                 and feature.group != "compat"]
        return known + self._unknown("ro_compat")

    def _unknown(self, group: str) -> list[str]:
        known = 0
        for feature in Feature:
            known |= feature.mask if feature.group == group else 0
        letter = {"compat": "C", "ro_compat": "R", "incompat": "I"}[group]
        return [f"FEATURE_{letter}{bit}" for bit in range(32) if self.words[group] & ~known & (1 << bit)]
