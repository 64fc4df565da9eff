"""Log events: fixed names with fields, rendered by structlog for a terminal, as JSON lines, or to syslog as JSON.

structlog is imported at the first event, not at start: nearly every mount logs nothing before it answers, and the
import costs 50 ms of the quarter of a second that a mount may take.  Nothing is logged per request; what a hostile
image or a failing disk could cause again and again goes through a ``Bounded``.
"""

import sys
import time
from collections.abc import MutableMapping
from enum import Enum
from typing import Any

BURST = 20              # events of one kind that are let through …
PERIOD_SECONDS = 60.0   # … in so long: enough to tell which blocks, not enough to fill a disk

_state: dict[str, Any] = {"syslog": False, "logger": None}


def to_syslog() -> None:
    """Send all further events to syslog: the daemon has left its terminal."""
    _state.update(syslog=True, logger=None)


def info(event: str, **fields: object) -> None:
    """Something a person may want to know."""
    _logger().info(event, **fields)


def warning(event: str, **fields: object) -> None:
    """Something a person should know."""
    _logger().warning(event, **fields)


def error(event: str, **fields: object) -> None:
    """Something that went wrong."""
    _logger().error(event, **fields)


def bug(event: str, error: BaseException, **fields: object) -> None:
    """A mistake of ours, with its traceback."""
    _logger().error(event, exc_info=error, **fields)


class Bounded:
    """Lets ``BURST`` events through per ``PERIOD_SECONDS`` and counts the rest."""

    def __init__(self) -> None:
        self._period_end = 0.0
        self._passed = 0
        self._suppressed = 0

    def passes(self, fields: dict[str, Any]) -> bool:
        """Whether this event may be logged; adds ``suppressed`` to its fields if others were not before it."""
        now = time.monotonic()
        if now >= self._period_end:
            self._period_end, self._passed = now + PERIOD_SECONDS, 0
        self._passed += 1
        if self._passed > BURST:
            self._suppressed += 1
            return False
        if self._suppressed:
            fields["suppressed"], self._suppressed = self._suppressed, 0
        return True


def _logger() -> Any:
    if _state["logger"] is None:
        _state["logger"] = _make_logger()
    return _state["logger"]


def _make_logger() -> Any:
    import structlog  # noqa: PLC0415 - see the module's docstring

    on_terminal = not _state["syslog"] and sys.stderr.isatty()
    if on_terminal:
        tail: list[Any] = [structlog.processors.TimeStamper("%H:%M:%S", utc=False), structlog.dev.ConsoleRenderer()]
    else:
        stamps = [] if _state["syslog"] else [structlog.processors.TimeStamper("iso")]
        tail = [*stamps, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=repr)]
    sink = _Syslog() if _state["syslog"] else structlog.PrintLogger(sys.stderr)
    return structlog.wrap_logger(sink, processors=[structlog.processors.add_log_level, _readable, *tail],
                                 wrapper_class=structlog.BoundLogger, cache_logger_on_first_use=False)


def _readable(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Names of files and enumerations as text; undecodable bytes and control characters visible."""
    for key, value in event.items():
        if isinstance(value, bytes):
            event[key] = value.decode("utf-8", "backslashreplace").encode("unicode_escape").decode("ascii")
        elif isinstance(value, Enum):
            event[key] = value.name
    return event


class _Syslog:
    """A structlog sink that writes rendered events to syslog(3) with the priority of their level."""

    def __init__(self) -> None:
        import syslog  # noqa: PLC0415 - only daemons need it

        syslog.openlog("fusewire", syslog.LOG_PID, syslog.LOG_DAEMON)
        self._write = syslog.syslog
        self._priorities = (syslog.LOG_INFO, syslog.LOG_WARNING, syslog.LOG_ERR)

    def info(self, line: str) -> None:
        self._write(self._priorities[0], line)

    def warning(self, line: str) -> None:
        self._write(self._priorities[1], line)

    def error(self, line: str) -> None:
        self._write(self._priorities[2], line)
