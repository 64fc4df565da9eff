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
    parsed = parse_options("data=ordered,commit=30,barrier,nodelalloc,ro")
    assert parsed.write_options == {"data": "ordered", "commit": "30", "barrier": None, "nodelalloc": None}
    assert parsed.notes() == [
        f"option {text} has no effect here" for text in ("data=ordered", "commit=30", "barrier", "nodelalloc")
    ]
    assert parse_options("data=ordered,rw").notes() == []
    assert parse_options("nombcache,dax=never").notes() == [
        "option nombcache has no effect here", "option dax=never has no effect here"
    ]


def test_quoted_values_may_hold_commas() -> None:
    parsed = parse_options('context="system_u:object_r:tmp_t:s0:c1,c2",ro')
    assert parsed.security == {"context": "system_u:object_r:tmp_t:s0:c1,c2"} and parsed.read_only


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ro,bogus", "unknown option: bogus"),
        ("bogus=1", "unknown option: bogus"),
        ("RO", "unknown option: RO"),
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
