"""What the superblock says while a file system is in use, and when it is put away clean.

With a journal, ``needs_recovery`` stands in the incompat features as long as the journal may hold something; without
one, the state loses its "clean" bit.  Kernel documentation, ext4, "The Super Block".
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
    fields: dict[str, int | bytes] = {
        "mtime": now_seconds & 0xFFFFFFFF, "mtime_hi": now_seconds >> 32 & 0xFF,
        "mnt_count": min(superstore.get(fs, "mnt_count") + 1, MOST_MOUNTS), "last_mounted": target[:63]}
    if Feature.HAS_JOURNAL in fs.superblock.features:
        fields["feature_incompat"] = superstore.get(fs, "feature_incompat") | Feature.RECOVER.mask
    else:
        fields["state"] = superstore.get(fs, "state") & ~STATE_VALID
    return _stored(fs, fields)


def put_away(fs: "Ext4", now_seconds: int) -> tuple[int, bytes]:
    """(block, bytes) of the superblock once everything is in its place: clean, unless errors were recorded."""
    state = superstore.get(fs, "state")
    fields: dict[str, int | bytes] = {
        "feature_incompat": superstore.get(fs, "feature_incompat") & ~Feature.RECOVER.mask,
        "wtime": now_seconds & 0xFFFFFFFF, "wtime_hi": now_seconds >> 32 & 0xFF}
    if not state & STATE_ERRORS:
        fields["state"] = state | STATE_VALID
    return _stored(fs, fields)


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
