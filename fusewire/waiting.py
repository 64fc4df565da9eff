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
