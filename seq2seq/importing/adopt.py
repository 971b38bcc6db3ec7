"""Import of translators of other programs: Marian in transformers' layout, and fairseq.

Import renames the tensors, joins the query, key and value projections, and reorders the rows of the embeddings. It also
adds one entry to each vocabulary (see seq2seq/importing/marian.py and seq2seq/importing/fairseq.py), unless this
program exported the file. The model computes the same function as the original.

Differs: the config must give the options that a file does not contain, such as the number of heads, the activation, the
eps of the norms, and whether embeddings are scaled. `model=transformer_opus` has the values of the published OPUS-MT
models.
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

WRAPPERS = ("model", "state_dict")  # keys of a file that may hold the weights
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
    """Convert another program's weights to our names; for Marian, also read the tokenizers in `folder`, if any.

    `content` is the file's content: the weights, or a dict with the weights under a key such as "model" or
    "state_dict". `folder` is the file's folder; with None, no tokenizers are read. Raises UserError for an unsupported
    file; the message names the file's format if it is recognised.
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
    """Extract a file's weights, with fp16 and bf16 converted to fp32, and the keys that are left out.

    Prefixes such as "module." are removed from the names; see common.weights.unwrapping.
    """
    tensors, left_out = unwrapping.unwrap(content, WRAPPERS, SUPPORTED)
    return unwrapping.floats(tensors), left_out
