"""The superblock of the journal: parsed, checked, and turned into the sizes that everything in the log depends on.

Kernel documentation, ext4, "Journal (jbd2)".  A journal block is counted from the start of the journal, whose block 0
is this superblock; the log is the ring of blocks [first, last).
"""

from enum import Enum
from typing import Any

from . import checksum, journallayout
from .errors import Check, Corrupt, Unsupported
from .layout import Record

MAGIC = 0xC03B3998
SUPER_V1, SUPER_V2 = 3, 4
MIN_BLOCKS = 1024               # JBD2_MIN_JOURNAL_BLOCKS
DEFAULT_FC_BLOCKS = 256         # JBD2_DEFAULT_FAST_COMMIT_BLOCKS
SUPERBLOCK_BYTES = 1024
CRC32C = 4                      # the only checksum type of versions 2 and 3
SEQUENCES = 1 << 32             # transaction numbers wrap around here
TAIL_BYTES = 4
UUID_BYTES = 16


class JournalFeature(Enum):
    """(name as dumpe2fs prints it, mask, word) of every feature of journals."""

    CHECKSUM = ("journal_checksum", 0x1, "feature_compat")
    REVOKE = ("journal_incompat_revoke", 0x1, "feature_incompat")
    BIT64 = ("journal_64bit", 0x2, "feature_incompat")
    ASYNC_COMMIT = ("journal_async_commit", 0x4, "feature_incompat")
    CSUM_V2 = ("journal_checksum_v2", 0x8, "feature_incompat")
    CSUM_V3 = ("journal_checksum_v3", 0x10, "feature_incompat")
    FAST_COMMIT = ("fast_commit", 0x20, "feature_incompat")

    @property
    def title(self) -> str:
        return self.value[0]

    @property
    def mask(self) -> int:
        return self.value[1]

    @property
    def word(self) -> str:
        return self.value[2]


class Checksums(Enum):
    """Which checksums the log carries."""

    NONE = "none"
    V1 = "v1"
    V2 = "v2"
    V3 = "v3"


class JournalSuperblock:
    """One checked journal superblock, immutable; ``raw`` is the whole block 0 of the journal.

    ``first``, ``last``: the log is the ring of journal blocks [first, last).  ``start``: where it begins, 0 if there is
    nothing to replay.  ``sequence``: the transaction expected there.  ``fc_first``, ``fc_last``: the fast commit area,
    [fc_first, fc_last), empty without the feature.
    """

    __slots__ = ("block_bytes", "checksums", "errno", "fc_first", "fc_last", "features", "first", "head", "last",
                 "maxlen", "raw", "record_bytes", "seed", "sequence", "start", "tag_bytes", "tag_record", "usable",
                 "uuid", "version", "wide")

    raw: bytes
    version: int
    features: frozenset[JournalFeature]
    checksums: Checksums
    block_bytes: int
    maxlen: int             # blocks of the whole journal
    first: int
    last: int
    start: int
    sequence: int
    head: int               # where the next transaction goes, kept by newer kernels while the log is empty, or 0
    errno: int              # why the journal was aborted (positive), or 0
    uuid: bytes
    seed: int               # of the checksums of versions 2 and 3
    fc_first: int
    fc_last: int
    wide: bool              # block numbers have 64 bits
    tag_record: Record
    tag_bytes: int
    record_bytes: int       # of one revocation record
    usable: int             # bytes of a descriptor or revocation block before its checksum

    @classmethod
    def parse(cls, raw: bytes, block_bytes: int, blocks: int) -> "JournalSuperblock":
        """Check block 0 of a journal of ``blocks`` blocks, ``block_bytes`` the block size of its file system.

        Raises:
            Corrupt: JOURNAL_SUPER (with the field that is wrong), JOURNAL_SUPER_CHECKSUM.
            Unsupported: incompatible features that are not known, by name.
        """
        if len(raw) < max(SUPERBLOCK_BYTES, block_bytes):
            raise Corrupt(Check.JOURNAL_SUPER, bytes=len(raw))
        fields = journallayout.SUPERBLOCK.decode(raw)
        if fields["magic"] != MAGIC:
            raise Corrupt(Check.JOURNAL_SUPER, magic=f"{fields['magic']:#010x}")
        if fields["kind"] not in (SUPER_V1, SUPER_V2):
            raise Corrupt(Check.JOURNAL_SUPER, kind=fields["kind"])
        self = cls()
        self.raw, self.block_bytes, self.version = bytes(raw), block_bytes, fields["kind"] - SUPER_V1 + 1
        self.features = _features(fields) if self.version == 2 else frozenset()
        self.checksums = _checksums(self.features, fields, raw)
        self._take(fields)
        self._check(fields, blocks)
        return self

    def _take(self, fields: dict[str, Any]) -> None:
        modern = self.version == 2
        self.maxlen, self.first = fields["maxlen"], fields["first"]
        self.sequence, self.start, self.errno = fields["sequence"], fields["start"], _errno(fields["errno"])
        self.head = fields["head"] if modern else 0
        self.uuid = fields["uuid"] if modern else bytes(UUID_BYTES)
        self.seed = checksum.seed_of(self.uuid)
        self.wide = JournalFeature.BIT64 in self.features
        sealed = self.checksums in (Checksums.V2, Checksums.V3)
        self.usable = self.block_bytes - (TAIL_BYTES if sealed else 0)
        self.record_bytes = 8 if self.wide else 4
        self.tag_record = journallayout.TAG3 if self.checksums is Checksums.V3 else (
            journallayout.TAG_WIDE if self.wide else journallayout.TAG)
        self.tag_bytes = self.tag_record.size + (2 if self.checksums is Checksums.V2 else 0)
        self.last = self.fc_first = self.fc_last = self.maxlen
        if JournalFeature.FAST_COMMIT in self.features:
            self.last -= fields["num_fc_blocks"] or DEFAULT_FC_BLOCKS
            self.fc_first = self.last + 1   # the kernel leaves one block between the ring and the area unused

    def _check(self, fields: dict[str, Any], blocks: int) -> None:
        if fields["block_bytes"] != self.block_bytes:
            raise Corrupt(Check.JOURNAL_SUPER, block_bytes=fields["block_bytes"], expected=self.block_bytes)
        if not MIN_BLOCKS <= self.maxlen <= blocks:
            raise Corrupt(Check.JOURNAL_SUPER, maxlen=self.maxlen, blocks=blocks)
        if self.last < MIN_BLOCKS:
            raise Corrupt(Check.JOURNAL_SUPER, num_fc_blocks=fields["num_fc_blocks"], maxlen=self.maxlen)
        if not 1 <= self.first < self.last:
            raise Corrupt(Check.JOURNAL_SUPER, first=self.first)
        if self.start and not self.first <= self.start < self.last:
            raise Corrupt(Check.JOURNAL_SUPER, start=self.start)

    def __contains__(self, feature: JournalFeature) -> bool:
        return feature in self.features

    @property
    def ring_blocks(self) -> int:
        """Length of the log."""
        return self.last - self.first

    def step(self, block: int, count: int = 1) -> int:
        """The journal block ``count`` (at most one round) after ``block`` in the ring."""
        block += count
        return block - self.ring_blocks if block >= self.last else block

    def patched(self, **fields: int) -> bytes:
        """Block 0 with these fields of the superblock changed and its checksum renewed."""
        record = bytearray(self.raw[:SUPERBLOCK_BYTES])
        for name, value in fields.items():
            width = int(journallayout.SUPERBLOCK.types[name][1:]) // 8
            at = journallayout.SUPERBLOCK.offsets[name]
            record[at:at + width] = value.to_bytes(width, "big")
        if self.checksums in (Checksums.V2, Checksums.V3):
            checksum.seal_journal_superblock(record)
        return bytes(record) + self.raw[SUPERBLOCK_BYTES:]

    def changed(self, **fields: int) -> "JournalSuperblock":
        """The superblock with these fields changed, checked again."""
        return JournalSuperblock.parse(self.patched(**fields), self.block_bytes, self.maxlen)

    def emptied(self, sequence: int, head: int = 0, forgive: bool = False) -> "JournalSuperblock":
        """The superblock that says: nothing to replay, ``sequence`` comes next (in block ``head`` if not 0).

        The feature fast_commit goes, as the kernel does it: an empty journal shall not keep old readers away.
        ``forgive``: forget why the journal was aborted; the file system's own superblock has that now.
        """
        fields = {"sequence": sequence % SEQUENCES, "start": 0} | ({"errno": 0} if forgive else {})
        if self.version == 2:
            incompat = journallayout.SUPERBLOCK.decode(self.raw)["feature_incompat"]
            fields |= {"head": head, "feature_incompat": incompat & ~JournalFeature.FAST_COMMIT.mask}
        return self.changed(**fields)

    def enabled(self, wide: bool, checksums: bool) -> "JournalSuperblock":
        """The superblock of an empty journal with the features that writing needs, as the kernel sets them at mount.

        Revocations always; ``wide``: the file system has 64bit; ``checksums``: it has metadata_csum, so the log gets
        version 3.  A superblock of version 1 becomes one of version 2.
        """
        assert not self.start, "the format of a log cannot change under its transactions"
        words = journallayout.SUPERBLOCK.decode(self.raw) if self.version == 2 else {}
        compat, incompat = words.get("feature_compat", 0), words.get("feature_incompat", 0)
        incompat |= JournalFeature.REVOKE.mask | (JournalFeature.BIT64.mask if wide else 0)
        fields = {"kind": SUPER_V2}
        if checksums:
            compat &= ~JournalFeature.CHECKSUM.mask
            incompat = incompat & ~JournalFeature.CSUM_V2.mask | JournalFeature.CSUM_V3.mask
            fields["checksum_type"] = CRC32C
        base = self if self.version == 2 else self._without_remains()
        raw = bytearray(base.patched(feature_compat=compat, feature_incompat=incompat, **fields))
        if checksums:
            head = bytearray(raw[:SUPERBLOCK_BYTES])
            checksum.seal_journal_superblock(head)
            raw[:SUPERBLOCK_BYTES] = head
        return JournalSuperblock.parse(bytes(raw), self.block_bytes, self.maxlen)

    def _without_remains(self) -> "JournalSuperblock":
        """Version 1 with zeroes where version 2 has fields."""
        end = journallayout.SUPERBLOCK.offsets["feature_compat"]
        raw = self.raw[:end] + bytes(SUPERBLOCK_BYTES - end) + self.raw[SUPERBLOCK_BYTES:]
        return JournalSuperblock.parse(raw, self.block_bytes, self.maxlen)


def _errno(stored: int) -> int:
    """The kernel stores errors as negative numbers."""
    return (1 << 32) - stored if stored >= 1 << 31 else stored


def _features(fields: dict[str, Any]) -> frozenset[JournalFeature]:
    """The known features; ``Unsupported`` if others are set that a reader must know."""
    unknown = []
    for word, letter in (("feature_incompat", "I"), ("feature_ro_compat", "R")):
        known = sum(feature.mask for feature in JournalFeature if feature.word == word)
        unknown += [f"FEATURE_{letter}{bit}" for bit in range(32) if fields[word] & ~known & 1 << bit]
    if unknown:
        raise Unsupported(f"unsupported journal feature: {', '.join(unknown)}")
    return frozenset(feature for feature in JournalFeature if fields[feature.word] & feature.mask)


def _checksums(features: frozenset[JournalFeature], fields: dict[str, Any], raw: bytes) -> Checksums:
    """The version of the checksums; at most one is allowed, and versions 2 and 3 cover the superblock too."""
    kinds = {JournalFeature.CHECKSUM: Checksums.V1, JournalFeature.CSUM_V2: Checksums.V2,
             JournalFeature.CSUM_V3: Checksums.V3}
    found = [kind for feature, kind in kinds.items() if feature in features]
    if len(found) > 1:
        raise Corrupt(Check.JOURNAL_SUPER, checksums=" and ".join(kind.value for kind in found))
    kind = found[0] if found else Checksums.NONE
    if kind in (Checksums.V2, Checksums.V3):
        if fields["checksum_type"] != CRC32C:
            raise Corrupt(Check.JOURNAL_SUPER, checksum_type=fields["checksum_type"])
        if not checksum.journal_superblock_ok(raw):
            raise Corrupt(Check.JOURNAL_SUPER_CHECKSUM, checksum=f"{fields['checksum']:#010x}")
    return kind


def is_after(sequence: int, other: int) -> bool:
    """Whether a transaction number comes after another; they wrap around."""
    return 0 < (sequence - other) % SEQUENCES < SEQUENCES // 2
