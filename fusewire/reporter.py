"""What is logged of errors, never so often that a bad disk fills logs, and of remounts."""

from collections.abc import Callable
from typing import Any

from fusewire import log
from fusewire.ext4.errors import Corrupt, Refused, Unsupported
from fusewire.ops import NotServed
from fusewire.session import Session
from fusewire.wire import ProtocolError


class Reporter:
    """Logs the errors of one mount."""

    def __init__(self, found_corrupt: Callable[[Corrupt], None]) -> None:
        """``found_corrupt`` is told of each rule that the disk breaks, after it was logged."""
        self._found_corrupt = found_corrupt
        self._logged: set[object] = set()
        self._bounds: dict[str, log.Bounded] = {}

    def error(self, error: Exception, op: str, node: int) -> None:
        """Log what ended an operation, unless it is an ordinary answer."""
        where: dict[str, Any] = {"op": op, "node": node}
        if isinstance(error, Refused):
            if isinstance(error, NotServed):
                self._once("opcode_not_served", op, **where)
        elif isinstance(error, Corrupt):
            self.bounded("corrupt", **{**where, **error.where, "check": error.check, "rule": error.check.value})
            self._found_corrupt(error)
        elif isinstance(error, Unsupported):
            self._once("unsupported", str(error), reason=str(error), **where)
        elif isinstance(error, OSError):
            self.bounded("device_error", error=str(error), **where)
        elif isinstance(error, ProtocolError):
            self.bounded("malformed_request", error=str(error), **where)
        elif self._bound("bug").passes(where):
            log.bug("bug", error, **where)

    def bounded(self, event: str, **fields: Any) -> None:
        """Log an error, a bounded number of times in a while."""
        if self._bound(event).passes(fields):
            log.error(event, **fields)

    def remounted(self, session: Session) -> None:
        """Log how the kernel has the file system mounted now; with a warning, if it believes that we can write."""
        log.info("remounted", **session.mounted._asdict())
        if session.read_only and not session.mounted.read_only:
            log.warning("stays_read_only", remedy="unmount, then mount with -o rw" if session.fs.writing is None
                        else "unmount, then run e2fsck: an error has turned it read-only")

    def _once(self, event: str, key: object, **fields: object) -> None:
        if (event, key) not in self._logged:
            self._logged.add((event, key))
            log.warning(event, **fields)

    def _bound(self, event: str) -> log.Bounded:
        return self._bounds.setdefault(event, log.Bounded())
