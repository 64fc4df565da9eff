"""What the superblock says while a file system is in use, and when it is put away clean.

With a journal, ``needs_recovery`` stands in the incompat features as long as the journal may hold something; without
one, the state loses its "clean" bit.  ``orphan_present`` stands in the ro_compat features as long as the orphan file
may hold something.  Kernel documentation, ext4, "The Super Block", "Orphan file".
"""

from typing import TYPE_CHECKING

from . import checksum, layout, superstore
from .blocks import CachedBlock
from .features import Feature
from .superblock import STATE_ERRORS, STATE_VALID

if TYPE_CHECKING:
    from .filesystem import Ext4

MOST_MOUNTS = 0xFFFF


def in_use(fs: "Ext4", now_seconds: int, target: bytes) -> tuple[int, bytes]:
    """(block, bytes) of the superblock of a file system that is being mounted to be written."""
    return _stored(fs, {
        "mtime": now_seconds & 0xFFFFFFFF, "mtime_hi": now_seconds >> 32 & 0xFF, "last_mounted": target[:63],
        "mnt_count": min(superstore.get(fs, "mnt_count") + 1, MOST_MOUNTS), **_unfinished(fs)})


def being_changed(fs: "Ext4") -> tuple[int, bytes]:
    """(block, bytes) of the superblock of a file system that is to be changed, but not newly mounted."""
    return _stored(fs, _unfinished(fs))


def put_away(fs: "Ext4", now_seconds: int) -> tuple[int, bytes]:
    """(block, bytes) of the superblock once everything is in its place: clean, unless errors were recorded."""
    state = superstore.get(fs, "state")
    fields: dict[str, int | bytes] = {
        "feature_incompat": superstore.get(fs, "feature_incompat") & ~Feature.RECOVER.mask,
        "wtime": now_seconds & 0xFFFFFFFF, "wtime_hi": now_seconds >> 32 & 0xFF}
    if fs.writing is not None and not any(hint >= 0 for hint in fs.writing.orphans.values()):
        fields["feature_ro_compat"] = superstore.get(fs, "feature_ro_compat") & ~Feature.ORPHAN_PRESENT.mask
    if not state & STATE_ERRORS:
        fields["state"] = state | STATE_VALID
    return _stored(fs, fields)


def _unfinished(fs: "Ext4") -> dict[str, int | bytes]:
    """What tells the next mount that there may be work left: of the journal, else of e2fsck; and of the orphan file."""
    fields: dict[str, int | bytes] = {}
    if Feature.HAS_JOURNAL in fs.superblock.features:
        fields["feature_incompat"] = superstore.get(fs, "feature_incompat") | Feature.RECOVER.mask
    else:
        fields["state"] = superstore.get(fs, "state") & ~STATE_VALID
    if Feature.ORPHAN_FILE in fs.superblock.features:
        fields["feature_ro_compat"] = superstore.get(fs, "feature_ro_compat") | Feature.ORPHAN_PRESENT.mask
    return fields


def _stored(fs: "Ext4", fields: dict[str, int | bytes]) -> tuple[int, bytes]:
    """The superblock's block with new fields, sealed, for the device, and in the cache from now on."""
    block, offset = superstore.place(fs)
    data = bytearray(fs.cache.entry(block).data)
    superstore.patch(data, offset, fields)
    if fs.has_checksums:
        record = data[offset:offset + layout.SUPERBLOCK.size]
        checksum.seal_superblock(record)
        data[offset:offset + len(record)] = record
    fs.cache.pin(block, CachedBlock(bytes(data)))
    return block, bytes(data)
