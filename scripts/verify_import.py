"""Check an imported model against another program: `python scripts/verify_import.py checkpoint=FILE model=NAME`.

The weights in FILE are loaded twice, into our model and into the model of a program that reads the file's layout
(torchvision, timm or transformers). Then the outputs of the two models for random inputs are compared. FILE can hold a
ViT (also a distilled one), a Swin Transformer, a TNT, a ResNet, an image GPT, a masked autoencoder or a translator;
scripts/verify/ has a file for each. Further arguments are config keys as for evaluate.py, such as
`model.blocks.activation=gelu_tanh`. The exit code is 0 if the outputs agree, 1 if they differ, or 2 if nothing can be
compared.
"""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.compose import configure
from common.errors import UserError
from common.train.assembly import stored_config
from scripts.verify import classifier, image_gpt, images, masked_autoencoder, resnet, swin, tnt, translator

KINDS = (classifier, swin, tnt, resnet, image_gpt, masked_autoencoder)
VERIFIERS: dict[str, Callable[[dict[str, Any]], tuple[str, bool]]] = {
    **{module.MODEL: partial(images.verify, module.KIND) for module in KINDS},
    translator.MODEL: translator.verify,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare the two models and print the report; returns the exit code."""
    console.guard()
    overrides = sys.argv[1:] if arguments is None else list(arguments)
    if not overrides or {"-h", "--help"} & {*overrides}:
        print(__doc__)
        return 0 if overrides else 2
    try:
        config = configure("evaluate", overrides, stored_config)
        target = config["model"]["_target_"]
        if target not in VERIFIERS:
            raise UserError(
                f"model._target_={target}: only {', '.join(VERIFIERS)} can be compared; give, for example, "
                "model=vit_b16, model=swin_t or model=transformer_opus."
            )
        text, agree = VERIFIERS[target](config)
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "verify_import.py"), file=sys.stderr)
        return 2
    print(text)
    return 0 if agree else 1


if __name__ == "__main__":
    start.script(main)
