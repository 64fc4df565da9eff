"""What all commands share on the command line: the parser, mount(8)'s exit codes, errors of one line."""

import argparse
import sys
from typing import NoReturn

EXIT_OK = 0
EXIT_USAGE = 1      # wrong arguments or options, no permission
EXIT_SYSTEM = 2     # out of memory, cannot fork, no /dev/fuse …
EXIT_FAILED = 32    # the mount failed


class Failure(Exception):
    """Why a command cannot go on: one line for the user, and the exit code."""

    def __init__(self, text: str, code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and mount(8)'s exit code for wrong usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and where help is to be had; end the program."""
        self.exit(EXIT_USAGE, f"fusewire: {message} (see {self.prog} --help)\n")


def say(text: str) -> None:
    """Print one line for the user on standard error; control characters in names do not reach the terminal."""
    shown = "".join(character if character.isprintable() else "?" for character in text)
    print(f"fusewire: {shown}", file=sys.stderr, flush=True)
