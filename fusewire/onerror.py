"""What follows when a file system that is mounted for writing turns out to be corrupt: the mount option ``errors``.

The superblock remembers the error in any case, so that the next e2fsck looks.  Then, as with the kernel's ext4:

    continue     nothing else: the operation that found it has failed
    remount-ro   no more changes; what was done before is still made durable
    panic        what was done before is made durable, then the daemon stops serving: a kernel would stop the machine
"""

from collections.abc import Callable

from fusewire import log
from fusewire.ext4 import errorlog
from fusewire.ext4.errors import Corrupt
from fusewire.ext4.transaction import Transaction
from fusewire.session import Session

Commit = Callable[[Callable[[OSError | None], None]], None]


class OnError:
    """Carries out the policy; in the loop's thread only."""

    def __init__(self, session: Session, policy: str, commit: Commit, turn_read_only: Callable[[], None],
                 stop: Callable[[], None]) -> None:
        self._session, self._policy, self._commit = session, policy, commit
        self._turn_read_only, self._stop = turn_read_only, stop
        self._stopping = False

    def found(self, error: Corrupt) -> None:
        """The disk broke a rule."""
        if self._session.read_only or self._session.fs.writing is None:
            return
        with Transaction(self._session.fs) as tx:
            tx.must_fit = True
            errorlog.record(tx, errorlog.occurrence(error))
        if self._policy == "remount-ro":
            log.error("turned_read_only", reason=str(error), policy="errors=remount-ro")
            self._turn_read_only()
            self._commit(lambda _failure: None)
        elif self._policy == "panic" and not self._stopping:
            self._stopping = True
            log.error("stopped_serving", reason=str(error), policy="errors=panic",
                      consequence="every access to the mount fails until it is unmounted and mounted again")
            self._commit(lambda _failure: self._stop())
