"""Work that no request asks for: freeing inodes that nobody can use any more."""

from fusewire.ext4 import inodefree
from fusewire.ext4.transaction import Transaction
from fusewire.session import Session


def release(session: Session, number: int) -> None:
    """Free an inode without names that the kernel has forgotten, a transaction at a time; may be run again."""
    done = False
    while not done:
        writing = session.fs.writing
        if writing is None or number not in writing.orphans or session.lookups.count(number):
            return
        with Transaction(session.fs) as tx:
            found = tx.inode(number)
            if found.links:
                return
            done = inodefree.release(tx, found)
