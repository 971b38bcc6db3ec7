"""Import of translators of other programs: Marian in transformers' layout, and fairseq.

Tensors keep their meaning. Their names and the order of the rows of a vocabulary change, and our vocabulary has one
additional entry (see seq2seq/importing/marian.py and seq2seq/importing/fairseq.py).

Differs: the config must give what a file does not hold: heads, the activation, the norms' eps, whether embeddings are
scaled. `model=transformer_opus` has the values of the published OPUS-MT models.
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

WRAPPERS = ("model", "state_dict")  # keys that may hold the weights
SUPPORTED = "a Marian of transformers or a fairseq Transformer"

# Patterns of tensor names, each with the unsupported format that it identifies; the first that matches decides.
UNSUPPORTED = (
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
    """A foreign file's weights under our names, and the tokenizers in its `folder`, if there are any.

    Weights are bare or under "model" or "state_dict". Raises UserError for an unsupported file and names its format.
    """
    tensors, left_out = unwrap(content)
    if marian.is_marian(tensors):
        adopted = marian.adopt(tensors, folder)
    elif fairseq.is_fairseq(tensors) and not any(re.search(r"layers\.\d+\.linear1\.", name) for name in tensors):
        adopted = fairseq.adopt(tensors)
    else:
        name = next(iter(tensors))
        format_name = identify_format(tensors, UNSUPPORTED) or "something else"
        raise UserError(
            f"The checkpoint is {format_name} and neither a Marian of transformers nor a fairseq "
            f"Transformer (it has {name}); give one of these, or a file that this program wrote."
        )
    return adopted._replace(left_out=adopted.left_out + left_out)


def unwrap(content: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """A file's weights without prefixes, half types in fp32, and the keys left out; see common.weights.unwrapping."""
    tensors, left_out = unwrapping.unwrap(content, WRAPPERS, SUPPORTED)
    return unwrapping.floats(tensors), left_out
