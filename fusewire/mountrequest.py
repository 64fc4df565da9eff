"""What is to be mounted where, independent of the way in which it is done, and the error when it cannot be."""

from collections.abc import Mapping
from dataclasses import dataclass, field

SUBTYPE = "fusewire"        # mount tables show fuse.fusewire or fuseblk.fusewire


class MountError(Exception):
    """A mount or unmount that failed; the text is one line with target, cause and, where there is one, the remedy."""


@dataclass(frozen=True, slots=True)
class MountRequest:
    """One mount to be made.  Options are those of fuse-vanilla-notes.md, section 10."""

    source: str                         # the block device for fuseblk; otherwise any name for the mount table
    target: str                         # an existing directory
    flags: int = 0                      # MS_* of ``fusewire.options``
    fuseblk: bool = False               # the kernel claims the device, waits for us at unmount, tells us of sync
    block_bytes: int = 4096             # block size that stat(2) and FIGETBSZ report; fuseblk only
    max_read_bytes: int = 1 << 20       # longest READ
    allow_other: bool = True            # for everybody, not only for the user who mounts
    security: Mapping[str, str] = field(default_factory=dict)   # SELinux: context=, …

    @property
    def fstype(self) -> str:
        """The type without subtype."""
        return "fuseblk" if self.fuseblk else "fuse"

    def fuse_options(self) -> dict[str, str | None]:
        """The file system's own options by name, without fd, rootmode and ids; None for those without a value."""
        chosen: dict[str, str | None] = {"default_permissions": None, "max_read": str(self.max_read_bytes)}
        if self.allow_other:
            chosen["allow_other"] = None
        if self.fuseblk:
            chosen["blksize"] = str(self.block_bytes)
        return chosen | dict(self.security)
