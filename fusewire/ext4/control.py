"""What ioctl(2) tells of an inode: the flags of FS_IOC_GETFLAGS and the record of FS_IOC_FSGETXATTR."""

from typing import NamedTuple

from .inode import (
    FLAG_APPEND,
    FLAG_DAX,
    FLAG_IMMUTABLE,
    FLAG_NOATIME,
    FLAG_NODUMP,
    FLAG_PROJINHERIT,
    FLAG_SYNC,
    FLAG_VERITY,
    Inode,
)

USER_VISIBLE = 0x725BDFFF  # the flags that the kernel's ext4 shows to people

# (inode flag, FS_XFLAG_* of <linux/fs.h>)
_XFLAGS = ((FLAG_SYNC, 0x20), (FLAG_IMMUTABLE, 0x8), (FLAG_APPEND, 0x10), (FLAG_NODUMP, 0x80), (FLAG_NOATIME, 0x40),
           (FLAG_PROJINHERIT, 0x200), (FLAG_DAX, 0x8000), (FLAG_VERITY, 0x20000))
_COMMON = sum(flag for flag, _ in _XFLAGS)      # the flags that both ioctls know


class FsXattr(NamedTuple):
    """struct fsxattr: extended flags, extent size hint, extents, project id, copy-on-write hint."""

    xflags: int
    extsize: int
    nextents: int
    projid: int
    cowextsize: int


def getflags(inode: Inode) -> int:
    """The flags for FS_IOC_GETFLAGS.  Regular files have nothing to hand a project down to."""
    return inode.flags & USER_VISIBLE & ~(FLAG_PROJINHERIT if inode.is_regular else 0)


def fsxattr(inode: Inode) -> FsXattr:
    """The record for FS_IOC_FSGETXATTR."""
    flags = getflags(inode)
    xflags = sum(xflag for flag, xflag in _XFLAGS if flags & flag)
    return FsXattr(xflags, 0, 0, inode.project, 0)


def flags_of(inode: Inode, xflags: int) -> int:
    """The flags for ``setattr.set_flags`` that FS_IOC_FSSETXATTR asks for; those it cannot name stay as they are."""
    return getflags(inode) & ~_COMMON | sum(flag for flag, xflag in _XFLAGS if xflags & xflag)
