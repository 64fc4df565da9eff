"""``fusewire umount TARGET…``: unmount, and return when the daemon has written everything and is gone."""

import argparse
import sys

from fusewire.mountrequest import MountError
from fusewire.unmount import unmount

# Exit codes of mount(8)
_OK, _USAGE, _SYSTEM, _INTERRUPTED, _FAILED, _SOME_FAILED = 0, 1, 2, 8, 32, 64


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the program's command line."""
    parser = subparsers.add_parser(
        "umount",
        help="unmount, and wait until the daemon is done",
        description="Unmount what fusewire serves.  Returns when the daemon has written everything and ended.",
        epilog="Exit codes are those of mount(8): 0 done, 2 system error, 8 interrupted, 32 failed, 64 some failed.",
    )
    parser.add_argument("target", nargs="+", metavar="TARGET", help="the directory, or the device or image mounted")
    parser.add_argument(
        "-l", "--lazy", action="store_true", help="detach now, finish when the last user has gone; does not wait"
    )
    parser.add_argument(
        "-f", "--force", action="store_true", help="cut the connection to a daemon that does not answer"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="do not say for what it waits")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unmount each target; the exit code."""
    results = [_unmount_one(target, args) for target in args.target]
    if _INTERRUPTED in results:
        return _INTERRUPTED
    failed = [code for code in results if code != _OK]
    return _SOME_FAILED if failed and len(failed) < len(results) else max(results)


def _unmount_one(target: str, args: argparse.Namespace) -> int:
    say = _nothing if args.quiet else _say
    try:
        unmount(target, lazy=args.lazy, force=args.force, say=say)
    except MountError as error:
        _say(str(error))
        return _FAILED
    except OSError as error:
        _say(f"{target}: {error.strerror or error}")
        return _SYSTEM
    except KeyboardInterrupt:
        _say(f"{target}: interrupted; the daemon finishes by itself")
        return _INTERRUPTED
    return _OK


def _say(text: str) -> None:
    print(f"fusewire: {text}", file=sys.stderr)


def _nothing(_text: str) -> None:
    """Say nothing."""
