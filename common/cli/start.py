"""Start a door or a script. Ctrl-C prints one line instead of a traceback, even while slow modules are being imported.

Therefore, slow modules are imported in the functions, inside their `try` blocks. Importing Hydra, which the command
line of the doors uses, takes a third of a second.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from common.config.compose import ConfigReader
    from common.files.run_folder import Job


def door(job: "Job", name: str, base: "ConfigReader | None" = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `job`, which does the work of the door `name`, with the config that the command line describes, then exit.

    `base` and `arguments` are passed to `common.cli.main.launch`.
    """
    try:
        from common.machine import collector

        collector.pause()  # until the job's modules are imported
        from common.cli import main

        main.launch(job, name, base, arguments)
    except KeyboardInterrupt:
        _exit_after_ctrl_c()


def script(main: Callable[[], int]) -> NoReturn:
    """Call a script's function `main` and exit with the code that it returns.

    If standard output could not be written, the exit code is 2 instead of 0. An OSError that `system_errors.describe`
    can explain, such as a full disk, is reported in one sentence, with exit code 2.
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
    """Run the command `triptych` (common/cli/command.py); this is the entry point of the installed package."""
    try:
        from common.cli import command

        command.main()
    except KeyboardInterrupt:
        _exit_after_ctrl_c()


def stored_config(file: Path) -> dict[str, Any]:
    """Read the config stored in a checkpoint; empty for a file of another program.

    This function imports torch, which is slow, so the doors call it only after the command line is parsed.
    """
    from common.train import assembly

    return assembly.stored_config(file)


def _exit_after_ctrl_c() -> NoReturn:
    print("Stopped by Ctrl-C.", file=sys.stderr)
    sys.exit(130)
