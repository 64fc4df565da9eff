"""Work that no request asks for: freeing inodes that nobody can use any more, clearing what a cut left behind."""

from fusewire import filewrite
from fusewire.ext4 import inodefree, truncate
from fusewire.ext4.transaction import Transaction
from fusewire.filewrite import WritePlan
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


def clear_tail(session: Session, number: int) -> WritePlan | None:
    """Zeroes for what stands behind the end of a file whose cut is durable; may be run again."""
    tx = Transaction(session.fs)
    found = tx.inode(number)
    if tx.writing is None or tx.writing.cuts.is_open(number) or not found.is_regular:
        return None     # one that was cut again has its turn later
    zeroes = filewrite.plan_clear(tx, found)

    def finish() -> None:
        with tx:
            truncate.cleared(tx, found)

    return WritePlan(zeroes, finish, again=lambda: clear_tail(session, number))
