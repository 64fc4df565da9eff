"""A device as it would be after the replay of its journal: what the log holds is read there, and nothing is written."""

import errno
from collections.abc import Iterator, Sequence

from fusewire.blockdev import BlockDevice, Buffer
from fusewire.ext4 import journalformat
from fusewire.ext4.journalfile import JournalFile
from fusewire.ext4.recovery import Replay
from fusewire.ext4.units import Geometry


class ReplayedDevice(BlockDevice):
    """Takes the place of a device, whose descriptor it takes over; metadata and file data are both seen replayed.

    Whoever reads the device by another way than this object does not see the replay.
    """

    def __init__(self, device: BlockDevice, geometry: Geometry, file: JournalFile, replay: Replay) -> None:
        """Raises what forbids the replay."""
        replay.require_sound()
        super().__init__(device.fd, device.start_bytes, device.size_bytes)
        self._geometry, self._file, self._replay = geometry, file, replay

    def read_into_now(self, view: memoryview, offset: int) -> int:
        """As on any device: of what the log holds, too, only the resident part."""
        length = super().read_into_now(view, offset)
        for at, count, address, within, escaped in self._logged(offset, length):
            content = memoryview(bytearray(self._geometry.block_bytes))
            if super().read_into_now(content, address) < len(content):
                return at
            view[at:at + count] = journalformat.unescaped(bytes(content), escaped)[within:within + count]
        return length

    def read_into(self, view: memoryview, offset: int) -> None:
        """As on any device."""
        super().read_into(view, offset)
        for at, count, address, within, escaped in self._logged(offset, len(view)):
            content = memoryview(bytearray(self._geometry.block_bytes))
            super().read_into(content, address)
            view[at:at + count] = journalformat.unescaped(bytes(content), escaped)[within:within + count]

    def _logged(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int, bool]]:
        """What of a range the log holds: (position in the range, length, address of the logged block, first byte in it,
        whether it is escaped there)."""
        geometry, end = self._geometry, offset + length
        for block in range(geometry.block_of(offset), geometry.blocks_for(end)):
            found = self._replay.source(block)
            if found is not None:
                start = max(geometry.byte_of(block), offset)
                stop = min(geometry.byte_of(block + 1), end)
                yield (start - offset, stop - start, geometry.byte_of(self._file.place(found[0])),
                       geometry.within_block(start), found[1])

    def write(self, offset: int, pieces: Sequence[Buffer]) -> None:
        """Refused: what is shown is not what is there."""
        raise OSError(errno.EROFS, "the journal is replayed in memory only", f"byte {offset}, {len(pieces)} pieces")

    def flush(self) -> None:
        """Nothing was written."""
