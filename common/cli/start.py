"""Start a door or a script. Ctrl-C ends it in one line, also while the modules that its work needs are being imported.

This module imports nothing that takes time: the command line of the doors (Hydra) takes a third of a second.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from common.config.compose import ConfigReader
    from common.files.run_folder import Job


def door(job: "Job", name: str, base: "ConfigReader | None" = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the door `name`, whose work is `job`, with the command line's config, and exit (`common.cli.main.launch`)."""
    try:
        from common.cli import main

        main.launch(job, name, base, arguments)
    except KeyboardInterrupt:
        _exit_after_ctrl_c()


def script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with the code that it returns; 2 if what it printed could not be written.

    A path or a limit that the operating system refuses is reported in one sentence, with exit code 2.
    """
    try:
        from common.files import names
        from common.machine import console, system_errors

        try:
            code = main()
        except OSError as error:
            if (sentence := system_errors.describe(error)) is None:
                raise
            print(names.printable(sentence), file=sys.stderr)
            code = 2
        sys.exit(console.exit_code(code))
    except KeyboardInterrupt:
        _exit_after_ctrl_c()


def triptych() -> None:
    """Run the command `triptych`."""
    try:
        from common.cli import command

        command.main()
    except KeyboardInterrupt:
        _exit_after_ctrl_c()


def stored_config(file: Path) -> dict[str, Any]:
    """Read the config inside a checkpoint. This imports torch, and so takes place after the command line is parsed."""
    from common.train import assembly

    return assembly.stored_config(file)


def _exit_after_ctrl_c() -> NoReturn:
    print("Stopped by Ctrl-C.", file=sys.stderr)
    sys.exit(130)
