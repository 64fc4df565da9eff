"""What waits in the server: steps that lack blocks, and how an operation looks that will never have them all."""

from collections.abc import Callable
from typing import Any

from fusewire.wire import Request

Step = Callable[[], Any]    # makes a reply of ``ops.Reply``, or raises what it has to wait for


class Starved(Exception):
    """An operation that never had all its blocks at once: the cache is too small for it, or the core loops."""


class Waiter:
    """A step that waits: how often it was run, and how many fetches it still waits for.

    ``request`` is answered with what the step returns; it is None for work that nobody has asked for.
    """

    __slots__ = ("attempts", "fetches", "request", "step")

    def __init__(self, request: Request | None, step: Step) -> None:
        self.request = request
        self.step = step
        self.attempts = 0
        self.fetches = 0


class Hopeful(list[Waiter]):
    """Steps that were refused for want of room while there were files without names: they run once more.

    The kernel may hand over up to eight requests before FORGETs that it sent earlier, so the room that these give back
    is asked for again when what had arrived is read and nothing is being freed.
    """

    def take(self, count: int) -> list[Waiter]:
        """The first ones, which hope no longer."""
        taken, self[:count] = self[:count], ()
        return taken
