"""``fusewire mount SOURCE TARGET``: mount a device or image, and serve it in the background."""

import argparse
from typing import Any

from fusewire import daemon


def add_parser(subparsers: Any) -> None:
    """Add the command to the command line."""
    parser = subparsers.add_parser(
        "mount", help="mount an ext4 device or image", description=daemon.DESCRIPTION, epilog=daemon.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    daemon.add_arguments(parser)
    parser.set_defaults(run=daemon.run)
