"""A mount whose daemon is killed at a chosen moment, under whoever uses it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.mounting import (
    DIES_WITH_US,
    READY_SECONDS,
    abandon,
    fusewire_command,
    fusewire_environment,
    mount_point,
    run,
    wait_mounted,
    wait_unused,
)


class Daemon:
    """The mount at ``root``, and who serves it."""

    def __init__(self, root: Path, process: subprocess.Popen[bytes]) -> None:
        self.root, self.process = root, process

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        self.process.kill()
        self.process.wait(READY_SECONDS)


@contextmanager
def killable(image: Path, options: str = "rw") -> Iterator[Daemon]:
    """A mount that everybody may enter; it is unmounted if its daemon lives to the end."""
    with mount_point() as target:
        os.chmod(target, 0o755)
        command = [*DIES_WITH_US, *fusewire_command(), "mount", "-f", "-o", options, str(image), str(target)]
        process = subprocess.Popen(command, env=fusewire_environment(), cwd="/", stdin=subprocess.DEVNULL)
        try:
            assert wait_mounted(target, process)
            yield Daemon(target, process)
            if process.poll() is None:
                run(*fusewire_command(), "umount", target, env=fusewire_environment())
                assert process.wait(READY_SECONDS) == 0
        finally:
            abandon(target, process)
    wait_unused(image)
