"""The command line: ``fusewire COMMAND …``; one module per command, imported only when its turn has come."""

import importlib
import sys
from collections.abc import Sequence

from fusewire import __version__
from fusewire.arguments import EXIT_USAGE, Parser, say

COMMANDS = ("mount", "umount", "info", "journal", "doctor")
_GLOBAL = ("-h", "--help", "--version")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in the arguments; its exit code.

    ``fusewire SOURCE TARGET`` (and ``fusewire -o OPTIONS SOURCE TARGET``) is short for ``fusewire mount …``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) == 1 and words[0][0] != "-" and words[0] not in COMMANDS:
        say(f"{words[0]}: no such command; there are {', '.join(COMMANDS)} (see fusewire --help)")
        return EXIT_USAGE
    if words and words[0] not in (*COMMANDS, *_GLOBAL):
        words.insert(0, "mount")
    parser = Parser(prog="fusewire", description="ext4 served from user space over the raw FUSE protocol.",
                    epilog="fusewire SOURCE TARGET is short for fusewire mount SOURCE TARGET.")
    parser.add_argument("--version", action="version", version=f"fusewire {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    # The command alone is imported; without one all are, for the help.
    for name in COMMANDS if not words or words[0] in _GLOBAL else words[:1]:
        importlib.import_module(f"fusewire.cli.{name}").add_parser(subparsers)
    args = parser.parse_args(words)
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
