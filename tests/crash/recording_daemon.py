"""``python -m tests.crash.recording_daemon LOG mount …``: fusewire, with everything noted that it does to its device.

LOG is a sequence of records (``HEADER``): a write, after it was done, with its bytes; a flush, as it begins and as it
ends.  A record is in LOG before anybody hears of what it tells.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Sequence

from fusewire import source
from fusewire.blockdev import BlockDevice, Buffer
from fusewire.cli import main

HEADER = struct.Struct("<cQQ")      # what, the number of the flush or the byte address, the bytes that follow
WRITE, FLUSH, FLUSHED = b"w", b"f", b"F"


class RecordingDevice(BlockDevice):
    """The device of one file system; there is one in this process."""

    log = -1
    lock = threading.Lock()
    flushes = 0

    def write(self, offset: int, pieces: Sequence[Buffer]) -> None:
        data = b"".join(pieces)
        with self.lock:
            super().write(offset, [data])
            self._note(WRITE, offset, data)

    def flush(self) -> None:
        with self.lock:
            self.flushes += 1
            number = self.flushes
            self._note(FLUSH, number)
        super().flush()
        with self.lock:
            self._note(FLUSHED, number)

    def _note(self, what: bytes, number: int, data: bytes = b"") -> None:
        os.write(self.log, HEADER.pack(what, number, len(data)) + data)


if __name__ == "__main__":
    RecordingDevice.log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
    source.BlockDevice = RecordingDevice    # type: ignore[misc]
    raise SystemExit(main(sys.argv[2:]))
