"""Translators of other programs in our names: Marian in transformers' layout, and fairseq.

Every tensor keeps its meaning; what differs is names, the order of a vocabulary's rows, and the entries that ours has
and theirs have not (see seq2seq/importing/marian.py and seq2seq/importing/fairseq.py).

Differs: what a file does not say must stand in the config: heads, the activation, the norms' eps, whether embeddings
are scaled. `model=transformer_opus` has what the published models of OPUS-MT have.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from seq2seq.importing import fairseq, layouts, marian

WRAPPERS = ("model", "state_dict")  # where programs put the weights beside other things
PREFIX = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DataParallel, and of compiled models

# Patterns of names that tell what a file is instead; the first that is found decides.
OTHERS = (
    (r"(encoder|decoder)\.blocks\.\d+\.attention\.in_proj", "bare weights of this program's own, without their config"),
    (r"layernorm_embedding\.", "a BART, with norms on its embeddings"),
    (r"model\.(encoder|decoder)\.layer_norm\.", "a Transformer of transformers with norms before its sub-layers"),
    (r"layers\.\d+\.linear1\.", "a torch.nn.Transformer"),
    (r"block\.\d+\.layer\.\d+\.", "a T5"),
    (r"(^|[./])wte|embed_tokens.*rotary|^model\.layers\.\d+\.", "a language model"),
    (r"(encoder|decoder)_l\d+_|^Wemb$", "a file of Marian's own; convert it to transformers' layout first"),
    (r"patch_embed|class_token|cls_token|queries|query_embed", "a model of images"),
)


def adopt(content: dict[str, Any], folder: Path | None) -> Adopted:
    """A foreign file's weights in our names, and the tokenizers that lie in `folder` beside it, if there are any.

    Takes bare weights and those under "model" or "state_dict". Raises UserError for any other file, saying what it is.
    """
    tensors, aside = unwrap(content)
    if marian.is_marian(tensors):
        adopted = marian.adopt(tensors, folder)
    elif fairseq.is_fairseq(tensors) and not any(re.search(r"layers\.\d+\.linear1\.", name) for name in tensors):
        adopted = fairseq.adopt(tensors)
    else:
        name = next(iter(tensors))
        what = next((what for pattern, what in OTHERS if any(re.search(pattern, key) for key in tensors)), None)
        raise UserError(
            f"The checkpoint is {what or 'something else'} and neither a Marian of transformers nor a fairseq "
            f"Transformer (it has {name}); give one of these, or a file that this program wrote."
        )
    return adopted._replace(left_out=adopted.left_out + aside)


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights by their plain names, half types raised, and the names of what is among them and no tensor.

    Raises UserError when there are none.
    """
    inner = next((content[key] for key in WRAPPERS if _holds_weights(content.get(key))), content)
    if not _holds_weights(inner):
        raise UserError(
            'The checkpoint holds no weights, bare or under "model" or "state_dict"; give a Marian of transformers or '
            "a fairseq Transformer, or a file that this program wrote."
        )
    aside = [name for name, value in inner.items() if not isinstance(value, Tensor)]
    return layouts.raised({PREFIX.sub("", name): t for name, t in inner.items() if name not in aside}), aside


def _holds_weights(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(value, Tensor) for value in content.values())
