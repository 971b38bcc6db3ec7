"""Does an imported file answer as where it comes from? `python scripts/verify_import.py checkpoint=FILE model=NAME`.

Reads the file twice, by our import and by the program that it comes from, and compares the answers to random inputs:
scripts/verify/classifier.py tells how for a ViT, scripts/verify/translator.py for a translator (model=transformer_opus,
say). Keys of the config go on top, as for evaluate.py: `model.blocks.activation=gelu_tanh`. Leaves with 0 when both
agree, with 1 when they do not, and with 2 when there is nothing to compare.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

from common.config.compose import configure
from common.errors import UserError
from common.train.assembly import stored_config
from scripts.verify import classifier, translator

BY_MODEL = {part.MODEL: part.verify for part in (classifier, translator)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare what the command line names and print it; returns the exit code."""
    line = sys.argv[1:] if arguments is None else list(arguments)
    if not line or {"-h", "--help"} & {*line}:
        print(__doc__)
        return 0 if line else 2
    try:
        config = configure("evaluate", line, stored_config)
        target = config["model"]["_target_"]
        if target not in BY_MODEL:
            raise UserError(
                f"model._target_={target}: only {' and '.join(BY_MODEL)} take such files; give model=vit_b16, say, or "
                "model=transformer_opus."
            )
        text, same = BY_MODEL[target](config)
    except UserError as error:
        print(str(error).replace("evaluate.py", "verify_import.py"), file=sys.stderr)  # its config is borrowed
        return 2
    print(text)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
