"""fairseq's TransformerModel (Ott et al. 2019, arXiv 1904.01038) in our names.

fairseq's vocabulary begins with <s>, <pad>, </s>, <unk>; it starts a translation with </s>, and its softmax is over all
entries. In ours PAD is its <pad>, EOS its </s>, UNK its <unk>; <s>, which it never uses, is put behind the others; and
BOS is a copy of </s>. An entry that is there twice would count twice in the softmax, so an output bias switches the
copy off: `model.output_bias=true`, `model.positions.layout=halves_t2t`, `model.positions.first=2`. Logits and log
probabilities of all entries are then fairseq's.
"""

import re
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.task import Adopted
from common.weights import projections
from common.weights.renaming import Table, rename
from seq2seq.importing import layouts
from seq2seq.tokenizers.bpe import BOS

NAMES = Table(*layouts.BLOCKS, *((f"{stack}.layer_norm.", f"{stack}.norm.") for stack in ("encoder", "decoder")))
# Versions, and tables of fixed sines, which our model computes.
LEFT_OUT = r"(encoder|decoder)\.(version|embed_positions\._float_tensor)"
SOURCE, TARGET = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
OUTPUTS = ("decoder.output_projection.weight", "decoder.embed_out")  # the latter before 2020
SPECIAL = 4


def adopt(tensors: dict[str, Tensor]) -> Adopted:
    """The weights of a state dict by our names; there is no tokenizer in fairseq's files.

    Raises UserError for what our Transformer has not, naming the tensor.
    """
    tables = {name: tensors[name] for name in (SOURCE, TARGET, *OUTPUTS) if name in tensors}
    parts = rename({name: t for name, t in tensors.items() if name not in tables}, NAMES.to_ours, LEFT_OUT)
    if parts.unknown:
        name = parts.unknown[0]
        raise UserError(_refusal(f"{name} {tuple(tensors[name].shape)} has no place in ours"))
    missing = [name for name in (SOURCE, TARGET) if name not in tables]
    if missing:
        raise UserError(_refusal(f"it has no {missing[0]}"))
    output = next((tables[name] for name in OUTPUTS if name in tables), tables[TARGET])
    orders = row_order(len(tables[SOURCE])), row_order(len(tables[TARGET]))
    bias = output.new_zeros(len(orders[1]))
    bias[BOS] = layouts.MASKED_LOGIT
    weights = layouts.embeddings((tables[SOURCE], tables[TARGET], output), orders)
    return Adopted({**projections.join(parts.tensors), **weights, "output_bias": bias}, {}, parts.left_out)


def row_order(size: int) -> list[int]:
    """Which of fairseq's rows each of our entries has: PAD, BOS, EOS, UNK, the dictionary, and <s>."""
    return [1, 2, 2, 3, *range(SPECIAL, size), 0]


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is in fairseq's layout and no plain Transformer ({reason}); give one with fixed sines as "
        "positions, without norms on embeddings or adapters."
    )


def is_fairseq(tensors: dict[str, Any]) -> bool:
    """Whether the names are those of fairseq's TransformerModel."""
    return any(re.match(layouts.BLOCK + r"(self_attn|encoder_attn|fc1)\.", name) for name in tensors)
