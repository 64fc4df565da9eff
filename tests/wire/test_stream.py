"""Data that are written in a row: the device is told to begin with them, once with each byte."""

from __future__ import annotations

import os
from pathlib import Path

from fusewire.blockdev import BlockDevice
from fusewire.filewrite import STREAM_BYTES, Stream

MIB = 1 << 20


def test_the_device_begins_with_what_follows_each_other() -> None:
    begun: list[tuple[int, int]] = []
    stream = Stream(lambda *of: begun.append(of))
    for megabyte in range(2 * STREAM_BYTES // MIB + 1):
        stream.add(MIB + megabyte * MIB, MIB)
    assert begun == [(MIB, STREAM_BYTES), (MIB + STREAM_BYTES, STREAM_BYTES)]


def test_what_is_written_elsewhere_begins_anew() -> None:
    begun: list[tuple[int, int]] = []
    stream = Stream(lambda *of: begun.append(of))
    stream.add(0, STREAM_BYTES - 1)
    stream.add(STREAM_BYTES, STREAM_BYTES - 1)
    stream.add(0, 4096)
    assert begun == []
    stream.add(4096, STREAM_BYTES)
    assert begun == [(0, STREAM_BYTES + 4096)]


def test_beginning_to_write_is_a_hint_that_never_fails(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * MIB)
    device = BlockDevice(os.open(path, os.O_RDWR))
    device.begin_writing(0, MIB)
    device.begin_writing(MIB, MIB)      # nothing is there
    device.close()
    device.begin_writing(0, MIB)
    assert path.read_bytes() == b"x" * MIB
