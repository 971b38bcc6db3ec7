"""Pause Python's garbage collector while a door imports its modules.

Importing PyTorch creates half a million objects that stay, and collections, which search them all for garbage, take a
fifth of the time.
"""

import atexit
import gc


def pause() -> None:
    """Stop automatic collections until `resume`."""
    gc.disable()


def resume() -> None:
    """Resume collections after `pause`; without it, this does nothing.

    The objects that exist now are not searched until the process ends. Then they are, because libraries otherwise
    report them as leaks.
    """
    if not gc.isenabled():
        gc.freeze()
        atexit.register(gc.unfreeze)
        gc.enable()
