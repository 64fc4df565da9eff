"""Who asks for a change: whether they may use the blocks that are reserved.

Sources: tune2fs(8), -m, -u, -g; ext4(5), resuid, resgid.
"""

from fusewire import uapi
from fusewire.ext4 import setattr
from fusewire.ext4.inode import Inode
from fusewire.ext4.transaction import Transaction
from fusewire.session import Session
from fusewire.wire import Request

ROOT_USER = 0
_FROM_CACHE: int = uapi.FUSE_WRITE_CACHE


def transaction(session: Session, request: Request) -> Transaction:
    """A transaction of the one who asks."""
    return Transaction(session.fs, privileged=may_use_reserve(session, request.uid, request.gid))


def may_use_reserve(session: Session, uid: int, gid: int) -> bool:
    """Root, and the user and the group that an option or the superblock names, unless those are root's."""
    fields, options = session.fs.superblock.fields, session.fs.options
    user, group = options.resuid, options.resgid
    if user is None:
        user = fields["def_resuid"] | fields["def_resuid_hi"] << 16
    if group is None:
        group = fields["def_resgid"] | fields["def_resgid_hi"] << 16
    return uid in (ROOT_USER, user) or (group != ROOT_USER and gid == group)


def writer_may_use_reserve(session: Session, request: Request, found: Inode, flags: int) -> bool:
    """As ``may_use_reserve``, for a WRITE with these flags.

    What comes from the page cache does not say who wrote it: its file's owner stands in for them.
    """
    if flags & _FROM_CACHE:
        return may_use_reserve(session, found.uid, found.gid)
    return may_use_reserve(session, request.uid, request.gid)


def dropped(tx: Transaction, request: Request, found: Inode) -> Inode:
    """A file whose data the caller changes by FALLOCATE or COPY_FILE_RANGE, without what made it privileged.

    WRITE and SETATTR say whether that is to happen; these do not.  Root keeps the bits, as CAP_FSETID lets it.
    """
    return found if request.uid == ROOT_USER else setattr.drop_privileges(tx, found)
