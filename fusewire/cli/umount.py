"""``fusewire umount TARGET…``: unmount, and return when the daemon has written everything and is gone."""

import argparse
from typing import Any

from fusewire.arguments import EXIT_FAILED, EXIT_OK, EXIT_SYSTEM, say
from fusewire.mountrequest import MountError
from fusewire.unmount import unmount

EXIT_INTERRUPTED, EXIT_SOME_FAILED = 8, 64      # of mount(8), as the others are


def add_parser(subparsers: Any) -> None:
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
    if EXIT_INTERRUPTED in results:
        return EXIT_INTERRUPTED
    failed = [code for code in results if code != EXIT_OK]
    return EXIT_SOME_FAILED if failed and len(failed) < len(results) else max(results)


def _unmount_one(target: str, args: argparse.Namespace) -> int:
    try:
        unmount(target, lazy=args.lazy, force=args.force, say=_nothing if args.quiet else say)
    except MountError as error:
        say(str(error))
        return EXIT_FAILED
    except OSError as error:
        say(f"{target}: {error.strerror or error}")
        return EXIT_SYSTEM
    except KeyboardInterrupt:
        say(f"{target}: interrupted; the daemon finishes by itself")
        return EXIT_INTERRUPTED
    return EXIT_OK


def _nothing(_text: str) -> None:
    """Say nothing."""
