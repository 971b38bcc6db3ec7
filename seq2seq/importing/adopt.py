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
from common.weights import unwrapping
from common.weights.renaming import identify_format
from seq2seq.importing import fairseq, marian

WRAPPERS = ("model", "state_dict")  # where programs put the weights beside other things
TAKEN = "a Marian of transformers or a fairseq Transformer"

# Patterns of names that tell what a file is instead; the first that matches decides.
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
        what = identify_format(tensors, OTHERS) or "something else"
        raise UserError(
            f"The checkpoint is {what} and neither a Marian of transformers nor a fairseq "
            f"Transformer (it has {name}); give one of these, or a file that this program wrote."
        )
    return adopted._replace(left_out=adopted.left_out + aside)


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights by their plain names in fp32, and what was beside them; see common.weights.unwrapping."""
    tensors, beside = unwrapping.unwrap(content, WRAPPERS, TAKEN)
    return unwrapping.floats(tensors), beside
