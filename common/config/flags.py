"""The flags of a door's command line, such as --config-dir. All other arguments are overrides (key=value)."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from common.errors import UserError


def parse_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Divide the arguments of a command line into flags and overrides.

    The result holds the values of the flags, and the other arguments as `overrides`. Raises UserError for an unknown
    flag, and for a flag whose value is missing or wrong.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("-c", "--cfg", choices=["job"])
    parser.add_argument("-cd", "--config-dir")
    parser.add_argument("-cn", "--config-name")
    parser.add_argument("overrides", nargs="*")
    return parser.parse_intermixed_args(arguments)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help.")
