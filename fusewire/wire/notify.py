"""Notifications: what the server tells the kernel unasked. Source: <linux/fuse.h>, enum fuse_notify_code.

Each is written like a reply with unique 0 and the code in the place of the error, after INIT only; the result of the
writev is the kernel's answer (ENOENT: it had nothing cached). INVAL_ENTRY and DELETE take the lock of the directory and
INVAL_INODE waits for pages: none may be sent from within a request on the same inode.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from fusewire import uapi
from fusewire.wire.reply import Buffer, Pieces, header

_pack_u64 = Struct("=Q").pack

PRUNE_MAX = 1024
"""Nodes in one PRUNE: keeps the message within two pages."""


def _notification(code: int, body: bytes, *data: Buffer) -> Pieces:
    length = len(body) + sum(map(len, data))
    return (header(0, length, code) + body, *data)


def notify_poll(kh: int) -> Pieces:
    """Wakes those who poll the handle that POLL called `kh`."""
    return _notification(uapi.FUSE_NOTIFY_POLL, uapi.notify_poll_wakeup_out.encode(kh=kh))


def notify_inval_inode(nodeid: int, offset: int = 0, length: int = 0) -> Pieces:
    """Drops attributes and pages from `offset`, `length` bytes or (0) all; a negative offset spares the pages."""
    body = uapi.notify_inval_inode_out.encode(ino=nodeid, off=offset, len=length)
    return _notification(uapi.FUSE_NOTIFY_INVAL_INODE, body)


def notify_inval_entry(parent: int, name: bytes, expire_only: bool = False) -> Pieces:
    """Drops a name, or only ends its validity (needs HAS_EXPIRE_ONLY), which keeps what is mounted below."""
    flags = uapi.FUSE_EXPIRE_ONLY if expire_only else 0
    body = uapi.notify_inval_entry_out.encode(parent=parent, namelen=len(name), flags=flags)
    return _notification(uapi.FUSE_NOTIFY_INVAL_ENTRY, body + name + b"\0")


def notify_delete(parent: int, child: int, name: bytes) -> Pieces:
    """Drops a name that was removed, if it still means this node; watchers of the node hear of its deletion."""
    body = uapi.notify_delete_out.encode(parent=parent, child=child, namelen=len(name))
    return _notification(uapi.FUSE_NOTIFY_DELETE, body + name + b"\0")


def notify_store(nodeid: int, offset: int, data: Buffer) -> Pieces:
    """Puts data into the page cache; the file grows if they end behind its end."""
    body = uapi.notify_store_out.encode(nodeid=nodeid, offset=offset, size=len(data))
    return _notification(uapi.FUSE_NOTIFY_STORE, body, data)


def notify_retrieve(notify_unique: int, nodeid: int, offset: int, size: int) -> Pieces:
    """Asks for cached pages; they come as a NOTIFY_REPLY request whose unique is `notify_unique`."""
    body = uapi.notify_retrieve_out.encode(notify_unique=notify_unique, nodeid=nodeid, offset=offset, size=size)
    return _notification(uapi.FUSE_NOTIFY_RETRIEVE, body)


def notify_resend() -> Pieces:
    """Asks for every request that was read and not answered once more (needs HAS_RESEND)."""
    return _notification(uapi.FUSE_NOTIFY_RESEND, b"")


def notify_inc_epoch() -> Pieces:
    """Makes every cached name and directory stale (7.44)."""
    return _notification(uapi.FUSE_NOTIFY_INC_EPOCH, b"")


def notify_prune(nodeids: Sequence[int]) -> Pieces:
    """Asks to forget these nodes if nothing uses them (7.45); unknown ones are ignored. At most PRUNE_MAX."""
    if len(nodeids) > PRUNE_MAX:
        raise ValueError(f"{len(nodeids)} nodes in one PRUNE, {PRUNE_MAX} allowed")
    body = uapi.notify_prune_out.encode(count=len(nodeids))
    return _notification(uapi.FUSE_NOTIFY_PRUNE, body + b"".join(_pack_u64(node) for node in nodeids))
