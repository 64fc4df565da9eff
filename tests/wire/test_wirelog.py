"""The wire log, and the recorded transcripts that are written in its format."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusewire import uapi, wire, wirelog
from tests.wire.messages import TRANSCRIPTS, made, message

PATHS = sorted(TRANSCRIPTS.glob("*.jsonl"))


@pytest.fixture
def log(tmp_path: Path) -> wirelog.WireLog:
    return wirelog.WireLog(tmp_path / "wire.jsonl")


def records(tmp_path: Path, log: wirelog.WireLog) -> list[wirelog.Record]:
    log.close()
    assert log.failure is None
    return list(wirelog.read(tmp_path / "wire.jsonl"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_transcripts_read_back_the_same(path: Path, tmp_path: Path, log: wirelog.WireLog) -> None:
    """What a replay writes is what was recorded, but for the times."""
    recorded = list(wirelog.read(path))
    for record in recorded:
        raw = wirelog.raw_of(record)
        if record["direction"] == "request":
            log.request(memoryview(raw))
        else:
            log.reply(raw[:16], raw[16:])
    replayed = records(tmp_path, log)
    assert len(replayed) == len(recorded) > 100
    for record in recorded + replayed:
        assert record.pop("time") > 0
        record.pop("duration", None)
    assert replayed == recorded


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_transcripts_pair_replies_with_requests(path: Path) -> None:
    asked = {r["unique"]: r["opcode"] for r in wirelog.read(path) if r["direction"] == "request"}
    replies = [r for r in wirelog.read(path) if r["direction"] == "reply"]
    assert {r["unique"]: r["opcode"] for r in replies}.items() <= asked.items()
    assert all(r["duration"] >= 0 for r in replies)


def test_requests_are_described(tmp_path: Path, log: wirelog.WireLog) -> None:
    raw = message(uapi.FUSE_SETXATTR, struct.pack("=IIII", 5, 1, 0, 0) + b'user.\xff"\n\0' + b"value")
    log.request(raw)
    (record,) = records(tmp_path, log)
    assert record.pop("time") > 0
    assert record == {
        "direction": "request", "opcode": "SETXATTR", "unique": 0x1122334455667788, "nodeid": 0x99AABBCCDDEEFF01,
        "uid": 0x02030405, "gid": 0x06070809, "pid": 0x0A0B0C0D, "names": ['user.\\xff"\n'], "payload": 5,
        "body": {"size": 5, "flags": 1, "setxattr_flags": 0}, "raw": raw.hex(),
    }  # fmt: skip


def test_requests_take_the_negotiated_shape(tmp_path: Path, log: wirelog.WireLog) -> None:
    log.negotiated(0)
    log.request(message(uapi.FUSE_SETXATTR, struct.pack("=II", 5, 1) + b"user.x\0" + b"value"))
    (record,) = records(tmp_path, log)
    assert (record["body"], record["names"]) == ({"size": 5, "flags": 1}, ["user.x"])


def exchange(tmp_path: Path, log: wirelog.WireLog, request: bytes, *reply: wire.Buffer) -> wirelog.Record:
    """The record of a reply to this request."""
    log.request(request)
    log.reply(*reply)
    return records(tmp_path, log)[-1]


def test_replies_are_described_by_their_request(tmp_path: Path, log: wirelog.WireLog) -> None:
    request = message(uapi.FUSE_OPEN, bytes(8), unique=6)
    record = exchange(tmp_path, log, request, wire.reply_open(6, 77, 2))
    assert (record["direction"], record["opcode"], record["error"]) == ("reply", "OPEN", 0)
    assert record["body"] == {"fh": 77, "open_flags": 2, "backing_id": 0}
    assert record["duration"] >= 0


def test_errors_are_described(tmp_path: Path, log: wirelog.WireLog) -> None:
    record = exchange(tmp_path, log, message(uapi.FUSE_LOOKUP, b"x\0", unique=6), wire.reply_error(6, 2))
    assert (record["opcode"], record["error"], "body" in record) == ("LOOKUP", -2, False)


@pytest.mark.parametrize("plus", [False, True])
def test_directory_entries_are_described(tmp_path: Path, log: wirelog.WireLog, plus: bool) -> None:
    entry = wire.pack_entry(9, 0, 0, 0, 0, 0, bytes(88))
    rows = [(5, 1, b"a", 4), (6, 2, b"longer \xff", 8)]
    data = b"".join(wire.direntplus(entry, *row) if plus else wire.dirent(*row) for row in rows)
    opcode = uapi.FUSE_READDIRPLUS if plus else uapi.FUSE_READDIR
    record = exchange(tmp_path, log, message(opcode, bytes(40), unique=6), *wire.reply_data(6, data + b"torn"))
    node = {"nodeid": 9} if plus else {}
    assert record["entries"] == [
        {"name": "a", "ino": 5, "next": 1, "type": 4} | node,
        {"name": "longer \\xff", "ino": 6, "next": 2, "type": 8} | node,
    ]


@pytest.mark.parametrize(("size", "described"), [(0, {"body": {"size": 8}}), (100, {"payload": 8})])
def test_xattr_replies_are_a_size_or_data(
    tmp_path: Path, log: wirelog.WireLog, size: int, described: dict[str, object]
) -> None:
    request = message(uapi.FUSE_GETXATTR, struct.pack("=II", size, 0) + b"user.x\0", unique=6)
    record = exchange(tmp_path, log, request, wire.header(6, 8), struct.pack("=II", 8, 0))
    assert {key: record[key] for key in ("body", "payload") if key in record} == described


def test_notifications_are_described(tmp_path: Path, log: wirelog.WireLog) -> None:
    log.reply(*wire.notify_store(5, 4096, b"data"))
    log.reply(*wire.notify_resend())
    log.reply(wire.header(0, 0, 1234))
    store, resend, unknown = records(tmp_path, log)
    assert (store["direction"], store["opcode"], store["payload"]) == ("notification", "NOTIFY_STORE", 4)
    assert store["body"] == {"nodeid": 5, "offset": 4096, "size": 4}
    assert (resend["opcode"], unknown["opcode"]) == ("NOTIFY_RESEND", 1234)


def test_what_cannot_be_decoded_is_kept(tmp_path: Path, log: wirelog.WireLog) -> None:
    bad = [b"", b"short", message(uapi.FUSE_OPEN, b"1234", unique=8)]
    for raw in bad:
        log.request(raw)
        log.reply(raw)
    found = records(tmp_path, log)
    assert [wirelog.raw_of(r) for r in found] == [raw for raw in bad for _ in "12"]
    assert [r.get("problem") for r in found[::2]] == [
        "message of 0 bytes", "message of 5 bytes", "open_in has 4 of 8 bytes",
    ]  # fmt: skip
    assert found[4]["opcode"] == "OPEN"


def test_every_opcode_can_be_logged(tmp_path: Path, log: wirelog.WireLog) -> None:
    for raw in made():
        log.request(raw)
    found = records(tmp_path, log)
    assert [r for r in found if "problem" in r] == []
    assert {r["opcode"] for r in found} >= {"LOOKUP", "STATX", "CUSE_INIT", "COPY_FILE_RANGE_64"}


@given(st.binary(max_size=300), st.one_of(st.none(), st.sampled_from(sorted(wire.SHAPES))), st.booleans())
def test_any_bytes_can_be_described(raw: bytes, opcode: int | None, size_only: bool) -> None:
    framed = struct.pack("=I", len(raw)) + raw[4:] if len(raw) > 4 else raw
    for data in (raw, framed):
        for record in (wirelog.describe_request(data), wirelog.describe_reply(data, opcode, size_only)):
            assert wirelog.raw_of(json.loads(json.dumps(record))) == data


def test_requests_without_reply_are_not_remembered(log: wirelog.WireLog) -> None:
    for opcode in (uapi.FUSE_FORGET, uapi.FUSE_BATCH_FORGET, uapi.FUSE_NOTIFY_REPLY):
        log.request(message(opcode, bytes(40)))
    assert not log._pending


def test_requests_never_answered_do_not_pile_up(log: wirelog.WireLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wirelog, "PENDING_MAX", 10)
    for unique in range(2, 60, 2):
        log.request(message(uapi.FUSE_STATFS, unique=unique))
    assert list(log._pending) == list(range(40, 60, 2))


def test_a_full_disk_ends_the_log_only() -> None:
    log = wirelog.WireLog("/dev/full")
    log.request(message(uapi.FUSE_STATFS))
    log.request(message(uapi.FUSE_STATFS))
    assert log.failure is not None
    log.close()


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        wirelog.WireLog(tmp_path / "no" / "such" / "folder")


@pytest.mark.parametrize("line", ["{", "[]", "5", '{"direction": "sideways"}', "{}"])
def test_other_files_are_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "other"
    path.write_text('{"direction": "reply"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"other:2: "):
        list(wirelog.read(path))


@pytest.mark.parametrize("record", [{}, {"raw": 5}, {"raw": "5"}, {"raw": "xx"}])
def test_records_without_bytes_are_refused(record: wirelog.Record) -> None:
    with pytest.raises(ValueError, match="not a wire log record"):
        wirelog.raw_of(record)
