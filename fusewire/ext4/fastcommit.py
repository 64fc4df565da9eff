"""Fast commits: what changed since the last transaction, as records at the end of the journal.

Kernel documentation, ext4, "Fast commits"; fs/ext4/fast_commit.h.  The area is a row of blocks, each a row of tags of
(kind, length, value) that no block boundary divides.  A commit is a run of tags that a tail ends, whose checksum covers
them; the first one begins with a head.  What counts:

- the area is only looked at if the first tag is a head that names the transaction which would come next;
- tags count up to the last tail with that number and the right checksum; what follows is a commit that was cut off, or
  remains of older ones, and was never acknowledged;
- a head with features that we do not know: the records mean something else, so nothing may be replayed.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import checksum, journallayout
from .errors import Check, Corrupt, Unsupported
from .extents import END_OF_FILE_BLOCKS, MAX_WRITTEN
from .journalsuper import JournalSuperblock
from .units import Geometry

ADD_RANGE, DEL_RANGE, CREATE, LINK, UNLINK, INODE, PAD, TAIL, HEAD = range(1, 10)
SUPPORTED_FEATURES = 0
MAX_NAME_BYTES = 255
MIN_INODE_BYTES = 128
_TAG_BYTES = journallayout.FC_TAG.size

Read = Callable[[int], bytes]


class AddRange(NamedTuple):
    """File blocks [file_block, file_block + length) of an inode are at ``start``."""

    inode: int
    file_block: int
    length: int
    start: int
    unwritten: bool


class DelRange(NamedTuple):
    """File blocks [file_block, file_block + length) of an inode are gone."""

    inode: int
    file_block: int
    length: int


class Create(NamedTuple):
    """A new inode got its first name; its ``InodeImage`` came before."""

    parent: int
    inode: int
    name: bytes


class Link(NamedTuple):
    """An inode got a further name."""

    parent: int
    inode: int
    name: bytes


class Unlink(NamedTuple):
    """A name went."""

    parent: int
    inode: int
    name: bytes


class InodeImage(NamedTuple):
    """An inode as it shall be on disk; the extents in it do not count, ranges say those."""

    inode: int
    raw: bytes


_NAMED: dict[int, type[Create] | type[Link] | type[Unlink]] = {CREATE: Create, LINK: Link, UNLINK: Unlink}
Change = AddRange | DelRange | Create | Link | Unlink | InodeImage


class _Tag(NamedTuple):
    kind: int
    raw: bytes      # kind and length
    value: bytes


class FastCommits:
    """The valid fast commits of a journal: iterate over their changes, in order, as often as needed."""

    def __init__(self, journal: JournalSuperblock, geometry: Geometry, read: Read) -> None:
        self._journal, self._geometry, self._read = journal, geometry, read
        self.tags = 0       # tags that count, heads, tails and padding included
        self.commits = 0    # tails that count

    def __iter__(self) -> Iterator[Change]:
        """The changes.  Raises ``Corrupt`` (FASTCOMMIT_RECORD) for one that is nonsense although its checksum fits."""
        tags = _tags(self._journal, self._geometry, self._read)
        for _, tag in zip(range(self.tags), tags, strict=False):
            change = _decode(tag, self._geometry)
            if change is not None:
                yield change


def scan(journal: JournalSuperblock, sequence: int, geometry: Geometry, read: Read) -> FastCommits:
    """The fast commits that belong after the log's last transaction, ``sequence`` being the next one's number.

    Raises:
        Unsupported: features of a head that we do not know.
        Corrupt: FASTCOMMIT_RECORD.
        OSError: from ``read``.
    """
    found = FastCommits(journal, geometry, read)
    running, seen = 0, 0
    for tag in _tags(journal, geometry, read):
        if not seen and tag.kind != HEAD:
            break
        seen += 1
        if tag.kind == TAIL:
            if not _ends_commit(tag, sequence, running):
                break
            found.tags, found.commits, running = seen, found.commits + 1, 0
            continue
        if tag.kind == HEAD and not _belongs(tag, sequence):
            break
        running = checksum.fast_commit(running, tag.raw + tag.value)
    for _ in found:
        pass
    return found


def _tags(journal: JournalSuperblock, geometry: Geometry, read: Read) -> Iterator[_Tag]:
    """All tags of the area, until one is malformed: nothing was written there, or remains of something."""
    for block in range(journal.fc_first, journal.fc_last):
        raw, at = read(block), 0
        while at + _TAG_BYTES <= len(raw):
            kind, length = journallayout.FC_TAG.unpack(raw, at)
            end = at + _TAG_BYTES + length
            if end > len(raw) or not _is_valid_length(kind, length, geometry):
                return
            yield _Tag(kind, raw[at:at + _TAG_BYTES], raw[at + _TAG_BYTES:end])
            at = end


def _is_valid_length(kind: int, length: int, geometry: Geometry) -> bool:
    if kind in (CREATE, LINK, UNLINK):
        return 1 <= length - journallayout.FC_NAME.size <= MAX_NAME_BYTES
    if kind == INODE:
        return MIN_INODE_BYTES <= length - journallayout.FC_INODE.size <= geometry.inode_bytes
    if kind == TAIL:
        return length >= journallayout.FC_TAIL.size
    exact = {ADD_RANGE: journallayout.FC_ADD_RANGE.size, DEL_RANGE: journallayout.FC_DEL_RANGE.size,
             HEAD: journallayout.FC_HEAD.size, PAD: length}
    return exact.get(kind) == length


def _belongs(head: _Tag, sequence: int) -> bool:
    features, number = journallayout.FC_HEAD.unpack(head.value)
    if number != sequence:
        return False
    if features & ~SUPPORTED_FEATURES:
        raise Unsupported(f"unsupported fast commit features: {features:#x}")
    return True


def _ends_commit(tail: _Tag, sequence: int, running: int) -> bool:
    number, stored = journallayout.FC_TAIL.unpack(tail.value)
    covered = tail.raw + tail.value[:journallayout.FC_TAIL.offsets["checksum"]]
    return bool(number == sequence and stored == checksum.fast_commit(running, covered))


# ---- from tags to changes ----------------------------------------------------------------------------------

def _decode(tag: _Tag, geometry: Geometry) -> Change | None:
    """The change that a tag stands for; None for heads, tails and padding."""
    if tag.kind in (PAD, TAIL, HEAD):
        return None
    if tag.kind == ADD_RANGE:
        return _add_range(tag.value, geometry)
    if tag.kind == DEL_RANGE:
        inode, file_block, count = journallayout.FC_DEL_RANGE.unpack(tag.value)
        return DelRange(_inode(inode, geometry), file_block, min(count, END_OF_FILE_BLOCKS - file_block))
    if tag.kind == INODE:
        (inode,) = journallayout.FC_INODE.unpack(tag.value)
        return InodeImage(_inode(inode, geometry), tag.value[journallayout.FC_INODE.size:])
    return _named(tag, geometry)


def _named(tag: _Tag, geometry: Geometry) -> Change:
    parent, inode = journallayout.FC_NAME.unpack(tag.value)
    name = tag.value[journallayout.FC_NAME.size:]
    if b"\0" in name or b"/" in name or name in (b".", b".."):
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=inode, name=name)
    return _NAMED[tag.kind](_inode(parent, geometry), _inode(inode, geometry), name)


def _add_range(value: bytes, geometry: Geometry) -> AddRange:
    inode, file_block, length, high, low = journallayout.FC_ADD_RANGE.unpack(value)
    count, start = length - MAX_WRITTEN if length > MAX_WRITTEN else length, low | high << 32
    if not count or file_block + count > END_OF_FILE_BLOCKS or not (
            geometry.first_data_block < start <= geometry.blocks - count):
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=inode, file_block=file_block, count=count, block=start)
    return AddRange(_inode(inode, geometry), file_block, count, start, length > MAX_WRITTEN)


def _inode(number: int, geometry: Geometry) -> int:
    if not 1 <= number <= geometry.inodes:
        raise Corrupt(Check.FASTCOMMIT_RECORD, inode=number)
    return number
