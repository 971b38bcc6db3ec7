"""Our tensors under a peer's names."""

import re
from collections.abc import Iterable

from torch import Tensor


def renamed(ours: dict[str, Tensor], patterns: Iterable[tuple[str, str]], *, split: bool) -> dict[str, Tensor]:
    """Every name with each pattern replaced in turn; `split` cuts an in_proj into its q_proj, k_proj and v_proj."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        names = [name.replace("in_proj", f"{part}_proj") for part in "qkv"] if split and ".in_proj." in name else [name]
        theirs.update(zip(names, tensor.chunk(len(names)), strict=True))
    return theirs
