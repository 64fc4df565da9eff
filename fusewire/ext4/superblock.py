"""The superblock: parsed, checked, and turned into a geometry.  Kernel documentation, ext4, "The Super Block"."""

import math
from typing import Any

from . import checksum, layout
from .errors import Check, Corrupt, Unsupported
from .features import Feature, FeatureSet
from .units import SUPERBLOCK_OFFSET_BYTES, Geometry, InodeNumber

MAGIC = 0xEF53
STATE_VALID = 1
STATE_ERRORS = 2
STATE_ORPHANS = 4
FLAG_SIGNED_HASH = 1
FLAG_UNSIGNED_HASH = 2
OLD_FIRST_INODE = 11
OLD_INODE_BYTES = 128
MOST_PLACES = 1 << 14       # places of descriptors that are remembered: 2 TiB of ordinary groups
MAX_BLOCK_LOG = 6  # 2^(10 + 6) = 64 KiB
ENCODING_UTF8_12_1 = 1
STRICT_ENCODING = 1


class Superblock:
    """One checked superblock: ``fields`` as on disk (halves joined), ``geometry``, ``features``, ``seed``."""

    def __init__(self, raw: bytes, fields: dict[str, Any], features: FeatureSet, geometry: Geometry) -> None:
        self.raw = raw
        self.fields = fields
        self.features = features
        self.geometry = geometry
        self._descriptors: dict[int, tuple[int, int]] = {}
        self.uuid: bytes = fields["uuid"]
        self.label: bytes = fields["volume_name"].split(b"\0", 1)[0]
        self.seed = fields["checksum_seed"] if Feature.CSUM_SEED in features else checksum.seed_of(self.uuid)
        self.first_inode = fields["first_ino"] if fields["rev_level"] else OLD_FIRST_INODE
        self.hash_seed: bytes = fields["hash_seed"]
        self.has_checksums = Feature.METADATA_CSUM in features
        self.special_inodes = frozenset(InodeNumber(number) for number in self._special_inodes() if number)

    @classmethod
    def parse(cls, raw: bytes, device_bytes: int) -> "Superblock":
        """Check the 1024 bytes that stand at byte 1024 of a device of the given size.

        Raises:
            Corrupt: not an ext4 superblock, or one with impossible values.
            Unsupported: features that fusewire cannot read, by name.
        """
        if len(raw) < layout.SUPERBLOCK.size:
            raise Corrupt(Check.SUPER_TRUNCATED, bytes=len(raw))
        fields = layout.SUPERBLOCK.decode(raw)
        if fields["magic"] != MAGIC:
            raise Corrupt(Check.SUPER_MAGIC, magic=f"{fields['magic']:#06x}")
        features = _features_of(fields)
        if Feature.METADATA_CSUM in features and not checksum.superblock_ok(raw):
            raise Corrupt(Check.SUPER_CHECKSUM, checksum=f"{fields['checksum']:#010x}")
        features.refuse_what_cannot_be_read()
        _join_halves(fields, features)
        geometry = _geometry(fields, features)
        if geometry.byte_of(geometry.blocks) > device_bytes:
            raise Corrupt(Check.SUPER_SIZE, blocks=geometry.blocks, block_bytes=geometry.block_bytes,
                          device_bytes=device_bytes)
        return cls(raw, fields, features, geometry)

    @property
    def needs_recovery(self) -> bool:
        """Whether the journal holds changes that are not in their places yet."""
        return Feature.RECOVER in self.features

    def warnings(self) -> list[str]:
        """What a person who mounts this file system should know, a sentence each."""
        state, sentences = self.fields["state"], []
        if state & STATE_ERRORS:
            sentences.append("the file system has recorded errors; check it with e2fsck")
        elif not state & STATE_VALID and Feature.HAS_JOURNAL not in self.features:
            sentences.append("the file system was not cleanly unmounted; check it with e2fsck")
        if Feature.ORPHAN_PRESENT in self.features or self.fields["last_orphan"]:
            sentences.append("deleted files wait to be freed; a writable mount will do it")
        return sentences

    def has_copy_in(self, group: int) -> bool:
        """Whether a group begins with a copy of superblock and descriptors (sparse_super, sparse_super2)."""
        if Feature.SPARSE_SUPER2 in self.features:
            return group in (0, self.fields["backup_bg_0"], self.fields["backup_bg_1"])
        if group <= 1 or Feature.SPARSE_SUPER not in self.features:
            return True
        return any(group == base ** round(math.log(group, base)) for base in (3, 5, 7))

    def copies_below(self, groups: int) -> int:
        """How many of the first ``groups`` groups ``has_copy_in`` is true of, without asking each."""
        if Feature.SPARSE_SUPER2 in self.features:
            return sum(1 for group in {0, self.fields["backup_bg_0"], self.fields["backup_bg_1"]} if group < groups)
        if Feature.SPARSE_SUPER not in self.features:
            return groups
        powers = (base ** exponent for base in (3, 5, 7) for exponent in range(1, 21))  # 3^20 > 2^31 groups
        return min(groups, 2) + sum(1 for power in powers if power < groups)

    def descriptor_block(self, group: int) -> tuple[int, int]:
        """(block, byte offset in it) of a group's descriptor; kernel documentation, ext4, "Meta Block Groups"."""
        found = self._descriptors.get(group)
        if found is None:
            if len(self._descriptors) >= MOST_PLACES:
                self._descriptors.clear()
            found = self._descriptors[group] = self._descriptor_block(group)
        return found

    def _descriptor_block(self, group: int) -> tuple[int, int]:
        geometry = self.geometry
        table_block, index = divmod(group, geometry.descs_per_block())
        offset = index * geometry.group_desc_bytes
        if Feature.META_BG not in self.features or table_block < self.fields["first_meta_bg"]:
            return self._first_block() + 1 + table_block, offset
        meta_group = table_block * geometry.descs_per_block()
        has_super = self.has_copy_in(meta_group)
        start: int = geometry.first_block_of(meta_group)
        if meta_group == 0 and geometry.first_data_block == 0 and geometry.block_bytes == SUPERBLOCK_OFFSET_BYTES:
            start += 1  # 1 KiB blocks with bigalloc: the superblock stands in block 1 of group 0
        return start + has_super, offset

    def head_blocks(self, group: int) -> int:
        """Blocks at the start of a group that a superblock copy, descriptors and their reserve take."""
        geometry = self.geometry
        per_block = geometry.descs_per_block()
        table_blocks = -(-geometry.groups // per_block)
        first_meta = self.fields["first_meta_bg"]
        copy = self.has_copy_in(group)
        if Feature.META_BG not in self.features or group < first_meta * per_block:
            plain = table_blocks if Feature.META_BG not in self.features else min(first_meta, table_blocks)
            return (1 + plain + self.fields["reserved_gdt_blocks"]) if copy else 0
        return copy + (group % per_block in (0, 1, per_block - 1))

    def hash_version(self, version: int) -> int:
        """A directory's hash version 0–2 turned into 3–5 where the file system hashes unsigned characters."""
        unsigned = self.fields["flags"] & FLAG_UNSIGNED_HASH
        return version + 3 if version <= 2 and unsigned else version

    def _first_block(self) -> int:
        return SUPERBLOCK_OFFSET_BYTES // self.geometry.block_bytes

    def _special_inodes(self) -> list[int]:
        names = ["usr_quota_inum", "grp_quota_inum", "prj_quota_inum"] if Feature.QUOTA in self.features else []
        if Feature.HAS_JOURNAL in self.features:
            names.append("journal_inum")
        if Feature.ORPHAN_FILE in self.features:
            names.append("orphan_file_inum")
        return [self.fields[name] for name in names]


def _features_of(fields: dict[str, Any]) -> FeatureSet:
    return FeatureSet(fields["feature_compat"], fields["feature_ro_compat"], fields["feature_incompat"])


def _join_halves(fields: dict[str, Any], features: FeatureSet) -> None:
    wide = Feature.BIT64 in features
    for name in ("blocks_count", "r_blocks_count", "free_blocks_count"):
        fields[name] = fields[f"{name}_lo"] | (fields[f"{name}_hi"] << 32 if wide else 0)
    for name in ("mtime", "wtime", "mkfs_time", "lastcheck", "first_error_time", "last_error_time"):
        fields[name] |= fields[f"{name}_hi"] << 32


def _geometry(fields: dict[str, Any], features: FeatureSet) -> Geometry:
    """The sizes, each checked before it is used: they decide about every offset that is computed later."""
    block_log = fields["log_block_size"]
    _require(block_log <= MAX_BLOCK_LOG, log_block_size=block_log)
    block_bytes = 1024 << block_log
    cluster_blocks = _cluster_blocks(fields, features, block_log)
    inode_bytes = _inode_bytes(fields, block_bytes)
    desc_bytes = _desc_bytes(fields, features)
    _require_counts(fields, features, block_bytes, cluster_blocks, inode_bytes)
    span = fields["blocks_count"] - fields["first_data_block"]
    groups = -(-span // fields["blocks_per_group"])
    _require(groups * fields["inodes_per_group"] == fields["inodes_count"],
             inodes_count=fields["inodes_count"], groups=groups, inodes_per_group=fields["inodes_per_group"])
    return Geometry(
        block_bytes=block_bytes, block_bits=10 + block_log, blocks=fields["blocks_count"],
        first_data_block=fields["first_data_block"], blocks_per_group=fields["blocks_per_group"],
        cluster_blocks=cluster_blocks, inodes=fields["inodes_count"], inodes_per_group=fields["inodes_per_group"],
        inode_bytes=inode_bytes, group_desc_bytes=desc_bytes, groups=groups)


def _cluster_blocks(fields: dict[str, Any], features: FeatureSet, block_log: int) -> int:
    cluster_log = fields["log_cluster_size"]
    if Feature.BIGALLOC not in features:
        return 1
    _require(block_log <= cluster_log <= 20, log_cluster_size=cluster_log)
    return int(1 << (cluster_log - block_log))


def _inode_bytes(fields: dict[str, Any], block_bytes: int) -> int:
    size: int = fields["inode_size"] if fields["rev_level"] else OLD_INODE_BYTES
    _require(OLD_INODE_BYTES <= size <= block_bytes and size & (size - 1) == 0, inode_size=size)
    return size


def _desc_bytes(fields: dict[str, Any], features: FeatureSet) -> int:
    if Feature.BIT64 not in features:
        return 32
    size: int = fields["desc_size"]
    _require(64 <= size <= 1024 and size & (size - 1) == 0, desc_size=size)
    return size


def _require_counts(fields: dict[str, Any], features: FeatureSet, block_bytes: int, cluster_blocks: int,
                    inode_bytes: int) -> None:
    bits = block_bytes * 8
    per_group, first = fields["blocks_per_group"], fields["first_data_block"]
    _require(0 < per_group <= bits * cluster_blocks, blocks_per_group=per_group)
    if Feature.BIGALLOC in features:
        _require(per_group == fields["clusters_per_group"] * cluster_blocks, blocks_per_group=per_group,
                 clusters_per_group=fields["clusters_per_group"])
    in_block = block_bytes // inode_bytes
    _require(in_block <= fields["inodes_per_group"] <= bits, inodes_per_group=fields["inodes_per_group"])
    _require(first in (0, 1) if block_bytes == SUPERBLOCK_OFFSET_BYTES else first == 0, first_data_block=first)
    _require(first < fields["blocks_count"] < 1 << 48, blocks_count=fields["blocks_count"])
    _require(fields["first_ino"] >= OLD_FIRST_INODE or not fields["rev_level"], first_ino=fields["first_ino"])
    if Feature.METADATA_CSUM in features and Feature.GDT_CSUM in features:
        raise Unsupported("metadata_csum and uninit_bg are both set; e2fsck mends that")
    _require(Feature.METADATA_CSUM not in features or fields["checksum_type"] == 1,
             checksum_type=fields["checksum_type"])


def _require(condition: bool, **where: object) -> None:
    if not condition:
        raise Corrupt(Check.SUPER_GEOMETRY, **where)
