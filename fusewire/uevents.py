"""What happens to the backing device while it is served: it vanishes, shrinks, grows, turns read-only.

The kernel multicasts a message about each change of a device (netlink, NETLINK_KOBJECT_UEVENT); pyroute2 reads them, in
a thread of its own, since its import alone takes a quarter of a second.  A message is only a reason to look: what is
reported comes from the device itself, so a forged one tells nothing wrong.
"""

import errno
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from fusewire import ioctl, log
from fusewire.blockdev import BlockDevice

KERNEL_GROUP = 1    # messages of the kernel; those of udev come after its rules have run
_GONE = frozenset((errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM, errno.EIO))

Report = Callable[[str, dict[str, Any]], None]


class DeviceWatch:
    """The state of a block device when it was last looked at."""

    def __init__(self, device: BlockDevice) -> None:
        self._device = device
        number = os.fstat(device.fd).st_rdev
        self._number = (str(os.major(number)), str(os.minor(number)))
        self._size = device.end_bytes()
        self._read_only = ioctl.is_read_only(device.fd)
        self._gone = False

    def concerns(self, message: Mapping[str, Any]) -> bool:
        """Whether a kernel message is about this device."""
        return message.get("SUBSYSTEM") == "block" and (message.get("MAJOR"), message.get("MINOR")) == self._number

    def changes(self, message: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """What is different from the last look, as log events with their fields; nothing after the device has gone."""
        if self._gone:
            return []
        try:
            size, read_only = self._device.end_bytes(), ioctl.is_read_only(self._device.fd)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            return self._vanish()
        if message.get("ACTION") == "remove" or (size == 0 and self._size):
            return self._vanish()
        found: list[tuple[str, dict[str, Any]]] = []
        if size != self._size:
            found.append(("device_shrank" if size < self._size else "device_grew",
                          {"before_bytes": self._size, "now_bytes": size}))
        if read_only != self._read_only:
            found.append(("device_turned_read_only" if read_only else "device_turned_writable", {}))
        self._size, self._read_only = size, read_only
        return found

    def _vanish(self) -> list[tuple[str, dict[str, Any]]]:
        self._gone = True
        return [("device_vanished", {})]


def report_to_log(event: str, fields: dict[str, Any]) -> None:
    """Log a change; what is cached is still answered, all else gets EIO."""
    (log.info if event in ("device_grew", "device_turned_writable") else log.error)(event, **fields)


def watch(device: BlockDevice, report: Report = report_to_log) -> threading.Thread:
    """A started thread that reports each change of a block device to the end of the process, from that thread."""
    thread = threading.Thread(target=_listen, args=(DeviceWatch(device), report), name="uevents", daemon=True)
    thread.start()
    return thread


def _listen(state: DeviceWatch, report: Report) -> None:
    try:
        from pyroute2.netlink.uevent import UeventSocket  # noqa: PLC0415 - see the module's docstring

        with UeventSocket() as socket:
            socket.bind(groups=KERNEL_GROUP)
            messages: list[Mapping[str, Any]] = [{}]    # first of all, what happened before we listened
            while True:
                for message in messages:
                    for event, fields in state.changes(message):
                        report(event, fields)
                messages = _received(socket, state)
    except (ImportError, OSError) as error:
        log.warning("device_not_watched", error=str(error))


def _received(socket: Any, state: DeviceWatch) -> list[Mapping[str, Any]]:
    """The next messages about our device; one that says nothing when some were lost, so that we look anyway."""
    try:
        return [message for message in socket.get() if state.concerns(message)]
    except OSError as error:
        if error.errno == errno.ENOBUFS:
            return [{}]
        raise
