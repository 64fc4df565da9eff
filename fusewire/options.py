"""The ``-o`` string of mount(8), parsed: mount flags for the kernel, ext4's options, fusewire's own.

Sources: mount(8), ext4(5), kernel documentation "ext4 General Information", Options.  One table row per option says
what it means; a later option overrides an earlier one.  A value may stand in double quotes, and then hold commas.

Every option is obeyed, or noted as being without effect (``MountOptions.notes``), or refused by its name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# mount(2) flags, linux/mount.h
MS_RDONLY = 1 << 0
MS_NOSUID = 1 << 1
MS_NODEV = 1 << 2
MS_NOEXEC = 1 << 3
MS_SYNCHRONOUS = 1 << 4
MS_DIRSYNC = 1 << 7
MS_NOSYMFOLLOW = 1 << 8
MS_NOATIME = 1 << 10
MS_NODIRATIME = 1 << 11
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

# default_mount_opts in the superblock (tune2fs -o); the others have no meaning here
DEFAULT_BSDGROUPS, DEFAULT_NOBARRIER, DEFAULT_DISCARD = 0x2, 0x100, 0x400
DEFAULT_DATA_MODE, DEFAULT_DATA_JOURNAL = 0x60, 0x20
DEFAULT_COMMIT_SECONDS = 5      # how long a change may wait until it is durable, if nobody asks

_ATIME = MS_NOATIME | MS_RELATIME | MS_STRICTATIME
MIB = 1 << 20


class OptionError(Exception):
    """An option that mount(8)'s user has to change; the text names it."""


@dataclass(slots=True)
class MountOptions:
    """The parsed option string.  Everything has the value that holds when nothing was said."""

    flags: int = 0                      # MS_*; MS_RDONLY when ``ro`` was said
    access: str = ""                    # "ro" or "rw" as said last, "" when neither was
    # ext4(5)
    noload: bool = False                # do not replay the journal
    errors: str = ""                    # continue, remount-ro or panic; "" as the superblock says
    minixdf: bool = False               # statfs reports the blocks of the metadata too
    user_xattr: bool = True
    acl: bool = True
    superblock: int = 1                 # which copy to read, in units of 1 KiB (``sb=``)
    commit_seconds: int = DEFAULT_COMMIT_SECONDS
    barrier: bool | None = None         # whether the device is told to flush its cache; None: as the superblock says
    discard: bool | None = None         # whether it is told what became free; None: as the superblock says
    grpid: bool | None = None           # whether new files get their directory's group; None: as the superblock says
    reserve_uid: int | None = None      # who may use the reserved blocks; None: whom the superblock names
    reserve_gid: int | None = None
    directory_kib: int = 0              # directories do not grow beyond this; 0: any size
    own_options: str = ""               # what the superblock asks for as a string; not obeyed
    for_writing: list[str] = field(default_factory=list)    # said of what concerns writing only
    # FUSE
    allow_other: bool | None = None     # None: root's mounts are for everybody, a user's for that user
    security: dict[str, str] = field(default_factory=dict)              # SELinux contexts, for the kernel
    # fusewire
    loop: bool = True                   # image files go behind a loop device, the mount is a fuseblk
    offset_bytes: int = 0               # where the file system starts in the source
    sizelimit_bytes: int = 0            # how much of the source may be used; 0: all that follows
    partition: int = 0                  # number of the partition that holds the file system; 0: not a whole disk
    cache_bytes: int = 0                # limit of the metadata cache; 0: the built-in one
    ignored: list[str] = field(default_factory=list)                    # said, but without effect here

    @property
    def read_only(self) -> bool:
        """Whether ``ro`` was asked for (and not overridden by ``rw``)."""
        return self.access == "ro"

    @property
    def writes(self) -> bool:
        """Whether ``rw`` was asked for."""
        return self.access == "rw"

    def notes(self) -> list[str]:
        """Sentences to log: about options that have no effect, and about what the others mean."""
        ignored = self.ignored if self.writes else [*self.ignored, *self.for_writing]
        said = [f"option {text} has no effect here{_WHY.get(text, '')}" for text in dict.fromkeys(ignored)]
        if self.own_options:
            said.append(f"the superblock's own options (tune2fs -E mount_opts) are not obeyed; give them by -o: "
                        f"{self.own_options}")
        if not self.access:
            said.append("mounted read-only; -o rw mounts for writing")
        if self.writes and self.barrier is False:
            said.append("no barriers: a power cut may lose what was fsynced, and damage the file system, unless the "
                        "device's cache survives it")
        return said

    def obey_superblock(self, defaults: int, own: bytes = b"") -> None:
        """Take ``default_mount_opts`` of a superblock where the option string says nothing; note ``mount_opts``."""
        self.own_options = own.rstrip(b"\0").decode("ascii", "replace")
        for name, bit in (("grpid", DEFAULT_BSDGROUPS), ("discard", DEFAULT_DISCARD)):
            if getattr(self, name) is None:
                setattr(self, name, bool(defaults & bit))
        if self.barrier is None:
            self.barrier = not defaults & DEFAULT_NOBARRIER
        if self.writes and defaults & DEFAULT_DATA_MODE == DEFAULT_DATA_JOURNAL:
            self.ignored.append("data=journal (the superblock's default)")


_WHY = {"data=writeback": ": data are durable before the metadata that name them, as with data=ordered",
        "mand": ": the kernel has no mandatory locks any more"}


_Apply = Callable[[MountOptions, str, str | None], None]


@dataclass(frozen=True, slots=True)
class _Row:
    """One option: whether it takes ``=value`` and what it does."""

    value: str          # "no", "must" or "may" take a value
    apply: _Apply
    writing: bool = False   # it concerns writing only


def _flags(on: int = 0, off: int = 0, noted: bool = False) -> _Row:
    def apply(options: MountOptions, name: str, _value: str | None) -> None:
        options.flags = options.flags & ~off | on
        if noted:
            options.ignored.append(name)
    return _Row("no", apply)


def _access(name: str) -> _Row:
    def apply(options: MountOptions, _name: str, _value: str | None) -> None:
        options.access = name
        options.flags = options.flags & ~MS_RDONLY | (MS_RDONLY if name == "ro" else 0)
    return _Row("no", apply)


def _set(attribute: str, value: object) -> _Row:
    def apply(options: MountOptions, _name: str, _value: str | None) -> None:
        setattr(options, attribute, value)
    return _Row("no", apply)


def _one_of(attribute: str, *choices: str) -> _Row:
    def apply(options: MountOptions, name: str, value: str | None) -> None:
        if value not in choices:
            raise OptionError(f"option {name}={value}: must be {', '.join(choices[:-1])} or {choices[-1]}")
        setattr(options, attribute, value)
    return _Row("must", apply)


_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_NUMBER = re.compile(r"(?P<digits>0[xX][0-9a-fA-F]+|[0-9]+)(?P<unit>[kKmMgGtT]?)(i?[bB])?", re.ASCII)
_LARGEST = (1 << 63) - 1    # loff_t
MOST_SECONDS = (1 << 31) - 1
MOST_ID = (1 << 32) - 1


def parse_bytes(name: str, text: str | None, unit_bytes: int = 1) -> int:
    """A number with an optional unit (K, M, G, T: powers of 1024) in bytes; without one it counts ``unit_bytes``."""
    match = _NUMBER.fullmatch(text or "")
    if match is None or len(match["digits"]) > 20:
        raise OptionError(f"option {name}={text}: not a number of bytes")
    number = int(match["digits"], 16 if match["digits"][:2] in ("0x", "0X") else 10)
    size = number << _UNITS[match["unit"].lower()] if match["unit"] else number * unit_bytes
    if size > _LARGEST:
        raise OptionError(f"option {name}={text}: too large")
    return size


def _bytes(attribute: str, unit_bytes: int = 1) -> _Row:
    def apply(options: MountOptions, name: str, value: str | None) -> None:
        setattr(options, attribute, parse_bytes(name, value, unit_bytes))
    return _Row("must", apply)


def _number(name: str, value: str | None, least: int, most: int) -> int:
    text = value or ""
    if not (text.isascii() and text.isdigit() and len(text) <= 20 and least <= int(text) <= most):
        raise OptionError(f"option {name}={value}: must be a number from {least} to {most}")
    return int(text)


def _count(attribute: str, least: int, most: int) -> _Row:
    def apply(options: MountOptions, name: str, value: str | None) -> None:
        setattr(options, attribute, _number(name, value, least, most))
    return _Row("must", apply)


def _ignore(_options: MountOptions, _name: str, _value: str | None) -> None:
    """For options that mount(8) and fstab(5) keep to themselves."""


def _note(options: MountOptions, name: str, value: str | None) -> None:
    """For options that the kernel's ext4 has and that have no meaning here."""
    options.ignored.append(name if value is None else f"{name}={value}")


def _barrier(options: MountOptions, name: str, value: str | None) -> None:
    if value not in (None, "0", "1"):
        raise OptionError(f"option {name}={value}: must be 0 or 1")
    options.barrier = value != "0"


def _commit(options: MountOptions, name: str, value: str | None) -> None:
    options.commit_seconds = _number(name, value, 0, MOST_SECONDS) or DEFAULT_COMMIT_SECONDS


def _data(options: MountOptions, name: str, value: str | None) -> None:
    if value == "journal":
        raise OptionError("option data=journal: file data are not written through the journal here; use data=ordered")
    if value not in ("ordered", "writeback"):
        raise OptionError(f"option {name}={value}: must be ordered or writeback")
    options.ignored = [text for text in options.ignored if not text.startswith("data=")]
    if value == "writeback":
        options.ignored.append("data=writeback")


def _refuse(reason: str) -> _Apply:
    def apply(_options: MountOptions, name: str, _value: str | None) -> None:
        raise OptionError(f"option {name}: {reason}")
    return apply


def _security(options: MountOptions, name: str, value: str | None) -> None:
    options.security[name] = value or ""


def _rows(names: str, row: _Row) -> dict[str, _Row]:
    return dict.fromkeys(names.split(), row)


def _writing(rows: dict[str, _Row]) -> dict[str, _Row]:
    return {name: replace(row, writing=True) for name, row in rows.items()}


_USER = MS_NOSUID | MS_NODEV | MS_NOEXEC

_TABLE: dict[str, _Row] = {
    # mount(8): flags of the mount and of the file system
    "ro": _access("ro"), "rw": _access("rw"),
    "nosuid": _flags(MS_NOSUID), "suid": _flags(off=MS_NOSUID),
    "nodev": _flags(MS_NODEV), "dev": _flags(off=MS_NODEV),
    "noexec": _flags(MS_NOEXEC), "exec": _flags(off=MS_NOEXEC),
    "nosymfollow": _flags(MS_NOSYMFOLLOW), "symfollow": _flags(off=MS_NOSYMFOLLOW),
    "sync": _flags(MS_SYNCHRONOUS), "async": _flags(off=MS_SYNCHRONOUS), "dirsync": _flags(MS_DIRSYNC),
    "noatime": _flags(MS_NOATIME, off=_ATIME), "atime": _flags(off=MS_NOATIME),
    "relatime": _flags(MS_RELATIME, off=_ATIME), "norelatime": _flags(off=MS_RELATIME),
    "strictatime": _flags(MS_STRICTATIME, off=_ATIME, noted=True), "nostrictatime": _flags(off=MS_STRICTATIME),
    "nodiratime": _flags(MS_NODIRATIME), "diratime": _flags(off=MS_NODIRATIME),
    "lazytime": _flags(MS_LAZYTIME, noted=True), "nolazytime": _flags(off=MS_LAZYTIME),
    # mount(8) gives these a meaning for flags besides its own checks of who may mount
    **_rows("user users", _flags(_USER)), **_rows("owner group", _flags(MS_NOSUID | MS_NODEV)),
    **_rows("defaults auto noauto nouser nousers noowner nogroup nofail _netdev noiversion nomand",
            _Row("no", _ignore)),
    **_rows("silent loud iversion mand", _Row("no", _note)),
    "comment": _Row("may", _ignore), "user_id": _Row("must", _ignore), "group_id": _Row("must", _ignore),
    **_rows("context fscontext defcontext rootcontext", _Row("must", _security)),
    # ext4(5): what reading obeys
    **_rows("noload norecovery", _set("noload", True)),
    "errors": _one_of("errors", "continue", "remount-ro", "panic"),
    "minixdf": _set("minixdf", True), "bsddf": _set("minixdf", False),
    "user_xattr": _set("user_xattr", True), "nouser_xattr": _set("user_xattr", False),
    "acl": _set("acl", True), "noacl": _set("acl", False),
    "sb": _count("superblock", 1, (1 << 48) - 1),
    # ext4(5): what only writing obeys
    **_writing({
        "commit": _Row("must", _commit), "data": _Row("must", _data),
        "barrier": _Row("may", _barrier), "nobarrier": _set("barrier", False),
        "discard": _set("discard", True), "nodiscard": _set("discard", False),
        **_rows("grpid bsdgroups", _set("grpid", True)), **_rows("nogrpid sysvgroups", _set("grpid", False)),
        "resuid": _count("reserve_uid", 0, MOST_ID), "resgid": _count("reserve_gid", 0, MOST_ID),
        "max_dir_size_kb": _count("directory_kib", 0, MOST_ID),
    }),
    **_rows("journal_path journal_dev", _Row("must", _refuse("a journal on another device cannot be used here"))),
    **_rows("noquota noi_version", _Row("no", _ignore)),
    # ext4(5): tuning of the kernel's implementation
    **_rows("inode_readahead_blks debug_want_extra_isize mb_optimize_scan fc_debug_max_replay dax auto_da_alloc "
            "init_itable quota usrquota grpquota prjquota", _Row("may", _note)),
    **_rows("journal_ioprio min_batch_time max_batch_time stripe data_err usrjquota grpjquota jqfmt check",
            _Row("must", _note)),
    **_rows("noauto_da_alloc noinit_itable delalloc nodelalloc journal_checksum nojournal_checksum "
            "journal_async_commit i_version journal_update dioread_lock dioread_nolock", _Row("no", _note)),
    **_rows("nombcache no_mbcache oldalloc orlov nobh bh nocheck block_validity noblock_validity debug warn_on_error "
            "nowarn_on_error prefetch_block_bitmaps no_prefetch_block_bitmaps inlinecrypt", _Row("no", _note)),
    "remount": _Row("no", _refuse("that is for mount(8): mount -o remount,… TARGET (mount -i for a plain fuse mount)")),
    # FUSE, as people who use other FUSE file systems write them
    "allow_other": _set("allow_other", True), "noallow_other": _set("allow_other", False),
    **_rows("default_permissions", _Row("no", _ignore)),
    # fusewire
    "noloop": _set("loop", False), "loop": _set("loop", True),
    "offset": _bytes("offset_bytes"), "sizelimit": _bytes("sizelimit_bytes"),
    "part": _count("partition", 1, 1 << 16), "cache_size": _bytes("cache_bytes", MIB),
}


def split_options(text: str) -> list[str]:
    """The comma-separated parts of an option string; commas between double quotes do not separate."""
    parts, quoted, start = [], False, 0
    for position, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(text[start:position])
            start = position + 1
    if quoted:
        raise OptionError("options: a double quote is not closed")
    parts.append(text[start:])
    return [part for part in parts if part]


def _apply_one(options: MountOptions, part: str) -> None:
    name, equals, raw = part.partition("=")
    value = raw.strip('"') if equals else None
    if name.startswith(("x-", "X-")):
        return
    row = _TABLE.get(name)
    if row is None:
        raise OptionError(f"unknown option: {name}")
    if row.value == "must" and not value:
        raise OptionError(f"option {name} needs a value: {name}=…")
    if row.value == "no" and value is not None:
        raise OptionError(f"option {name} takes no value: {part}")
    row.apply(options, name, value)
    if row.writing:
        options.for_writing.append(part)


def _check_together(options: MountOptions) -> None:
    if options.partition and options.offset_bytes:
        raise OptionError("options part= and offset= both say where the file system starts; give one")
    if options.offset_bytes % 512 or options.sizelimit_bytes % 512:
        raise OptionError("options offset= and sizelimit= must be multiples of 512 bytes")


def parse_options(text: str) -> MountOptions:
    """The options in a mount(8) ``-o`` string.  ``OptionError`` names the first that is unknown or malformed."""
    options = MountOptions()
    for part in split_options(text):
        _apply_one(options, part)
    _check_together(options)
    return options
