"""The option string: what each option means, what is refused and how it is said."""

import os
import random

import pytest

from fusewire import options
from fusewire.options import MountOptions, OptionError, parse_options


def test_nothing_said() -> None:
    assert parse_options("") == parse_options("defaults") == parse_options(",,") == MountOptions()


def test_everything_said() -> None:
    parsed = parse_options(
        "ro,nosuid,nodev,noexec,noatime,nodiratime,sync,dirsync,lazytime,nosymfollow,noload,errors=remount-ro,minixdf,"
        "nouser_xattr,noacl,sb=32768,allow_other,noloop,offset=1M,sizelimit=0x40000000,cache_size=64"
    )
    assert parsed == MountOptions(
        flags=options.MS_RDONLY | options.MS_NOSUID | options.MS_NODEV | options.MS_NOEXEC | options.MS_NOATIME
        | options.MS_NODIRATIME | options.MS_SYNCHRONOUS | options.MS_DIRSYNC | options.MS_LAZYTIME
        | options.MS_NOSYMFOLLOW,
        access="ro", noload=True, errors="remount-ro", minixdf=True, user_xattr=False, acl=False, superblock=32768,
        allow_other=True, loop=False, offset_bytes=1 << 20, sizelimit_bytes=1 << 30, cache_bytes=64 << 20,
        ignored=["lazytime"],
    )


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("ro,rw", 0), ("rw,ro", options.MS_RDONLY), ("nosuid,suid", 0), ("noexec,exec,nodev,dev", 0), ("sync,async", 0),
        ("noatime,relatime", options.MS_RELATIME), ("relatime,strictatime", options.MS_STRICTATIME),
        ("noatime,atime", 0), ("nodiratime,diratime", 0), ("lazytime,nolazytime", 0), ("strictatime,nostrictatime", 0),
        ("user", options.MS_NOSUID | options.MS_NODEV | options.MS_NOEXEC),
        ("users,exec", options.MS_NOSUID | options.MS_NODEV), ("owner", options.MS_NOSUID | options.MS_NODEV),
        ("noexec,user,suid,dev,exec", 0),
    ],
)
def test_later_flags_override_earlier_ones(text: str, flags: int) -> None:
    assert parse_options(text).flags == flags


def test_what_belongs_to_fstab_is_ignored() -> None:
    text = "_netdev,nofail,x-systemd.automount,x-gvfs-name=a%20b,X-mount.mkdir=0755,comment=mine,noauto,auto,defaults"
    assert parse_options(text) == MountOptions()


def test_options_that_concern_writing() -> None:
    text = "data=ordered,commit=30,barrier,nodelalloc,resuid=5,resgid=6,grpid,discard,max_dir_size_kb=7"
    parsed = parse_options(f"{text},rw")
    assert (parsed.commit_seconds, parsed.barrier, parsed.discard, parsed.grpid) == (30, True, True, True)
    assert (parsed.reserve_uid, parsed.reserve_gid, parsed.directory_kib) == (5, 6, 7)
    assert parsed.notes() == ["option nodelalloc has no effect here"]
    assert sorted(parse_options(f"{text},ro").notes()) == sorted(
        f"option {part} has no effect here" for part in text.split(","))
    assert parse_options("nombcache,dax=never,rw").notes() == [
        "option nombcache has no effect here", "option dax=never has no effect here"
    ]
    assert parse_options("rw,commit=0").commit_seconds == 5


def test_what_has_to_be_said_of_options() -> None:
    assert parse_options("").notes() == ["mounted read-only; -o rw mounts for writing"]
    for text in ("ro", "rw", "rw,nobarrier,barrier=1", "rw,data=ordered"):
        assert parse_options(text).notes() == []
    assert "a power cut may lose what was fsynced" in parse_options("rw,barrier=0").notes()[0]
    assert len(parse_options("rw,data=writeback,data=writeback").notes()) == 1
    assert parse_options("rw,data=writeback,data=ordered").notes() == []


def test_the_superblock_has_a_say_where_nothing_was_said() -> None:
    for text, defaults, expected in (
        ("rw", 0, (False, False, True)), ("rw", 0x502, (True, True, False)),
        ("rw,nogrpid,nodiscard,barrier", 0x502, (False, False, True)),
        ("rw,grpid,discard,nobarrier", 0, (True, True, False)),
    ):
        parsed = parse_options(text)
        parsed.obey_superblock(defaults)
        assert (parsed.grpid, parsed.discard, parsed.barrier) == expected
    owned = parse_options("rw")
    owned.obey_superblock(0, b"commit=9,nodelalloc".ljust(64, b"\0"))
    assert owned.notes() == ["the superblock's own options (tune2fs -E mount_opts) are not obeyed; give them by -o: "
                             "commit=9,nodelalloc"]
    journaled = parse_options("rw")
    journaled.obey_superblock(0x20)
    assert journaled.notes() == ["option data=journal (the superblock's default) has no effect here"]


def test_quoted_values_may_hold_commas() -> None:
    parsed = parse_options('context="system_u:object_r:tmp_t:s0:c1,c2",ro')
    assert parsed.security == {"context": "system_u:object_r:tmp_t:s0:c1,c2"} and parsed.read_only


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ro,bogus", "unknown option: bogus"),
        ("bogus=1", "unknown option: bogus"),
        ("RO", "unknown option: RO"),
        ("data=journal", "option data=journal: file data are not written through the journal here; use data=ordered"),
        ("rw,data=both", "option data=both: must be ordered or writeback"),
        ("rw,journal_dev=0x801", "option journal_dev: a journal on another device cannot be used here"),
        ("remount,rw",
         "option remount: that is for mount(8): mount -o remount,… TARGET (mount -i for a plain fuse mount)"),
        ("rw,barrier=2", "option barrier=2: must be 0 or 1"),
        ("rw,commit=-1", "option commit=-1: must be a number from 0 to 2147483647"),
        ("rw,resuid=root", "option resuid=root: must be a number from 0 to 4294967295"),
        ("errors", "option errors needs a value: errors=…"),
        ("errors=", "option errors needs a value: errors=…"),
        ("errors=panics", "option errors=panics: must be continue, remount-ro or panic"),
        ("ro=1", "option ro takes no value: ro=1"),
        ("sb=0", "option sb=0: must be a number from 1 to 281474976710655"),
        ("sb=-1", "option sb=-1: must be a number from 1 to 281474976710655"),
        ("sb=²", "option sb=²: must be a number from 1 to 281474976710655"),
        ("part=x", "option part=x: must be a number from 1 to 65536"),
        ("offset=ten", "option offset=ten: not a number of bytes"),
        ("offset=-512", "option offset=-512: not a number of bytes"),
        ("offset=1P", "option offset=1P: not a number of bytes"),
        ("offset=99999999999999999999", "option offset=99999999999999999999: too large"),
        ("offset=9999999T", "option offset=9999999T: too large"),
        ("offset=513", "options offset= and sizelimit= must be multiples of 512 bytes"),
        ("sizelimit=1", "options offset= and sizelimit= must be multiples of 512 bytes"),
        ("part=1,offset=512", "options part= and offset= both say where the file system starts; give one"),
        ('context="a,b', "options: a double quote is not closed"),
    ],
)
def test_refusals_name_the_option(text: str, message: str) -> None:
    with pytest.raises(OptionError) as raised:
        parse_options(text)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("1k", 1024), ("2KiB", 2048), ("1MB", 1 << 20), ("3g", 3 << 30), ("0x200", 512), ("1T", 1 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_options(f"offset={text}").offset_bytes == size


def test_any_text_gives_options_or_an_option_error() -> None:
    seed = int(os.environ.get("FUSEWIRE_SEED", "0")) or random.SystemRandom().getrandbits(32)
    print(f"FUSEWIRE_SEED={seed}")
    chance = random.Random(seed)
    words = ["ro", "rw", "offset", "part", "sb", "errors", "context", "x-", "=", "=1", "=0x", "=" + "9" * 30]
    words += [",", '"', "\\", "\0", "é"]
    for _ in range(3000):
        text = "".join(chance.choice(words) for _ in range(chance.randint(0, 8)))
        try:
            assert isinstance(parse_options(text), MountOptions)
        except OptionError as error:
            assert "\n" not in str(error)
