"""Import of fairseq's TransformerModel (Ott et al. 2019, arXiv 1904.01038).

fairseq's vocabulary begins with <s>, <pad>, </s>, <unk>. Its decoder input starts with </s>, and its softmax is over
all entries. In our vocabulary, PAD, EOS and UNK are fairseq's <pad>, </s> and <unk>. BOS is a copy of </s>. The entry
<s>, which fairseq never uses, comes last. Since BOS is a copy, </s> would count twice in the softmax; an output bias
that masks BOS prevents this. With `model.output_bias=true`, `model.positions.layout=halves_t2t` and
`model.positions.first=2`, log probabilities and all logits but that of BOS are those of fairseq.
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
# Names of tensors that the import leaves out: version numbers, and one-element tensors that record the dtype and device
# of sinusoidal positions.
LEFT_OUT = r"(encoder|decoder)\.(version|embed_positions\._float_tensor)"
SOURCE, TARGET = "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"
OUTPUTS = ("decoder.output_projection.weight", "decoder.embed_out")  # embed_out is the name before 2020
SPECIAL_ENTRIES = 4  # <s>, <pad>, </s>, <unk>


def adopt(tensors: dict[str, Tensor]) -> Adopted:
    """Convert a state dict of fairseq to our names. The task state is empty, since fairseq's files hold no tokenizer.

    Raises UserError if an embedding is missing, and for a tensor that our Transformer does not have.
    """
    matrices = {name: tensors[name] for name in (SOURCE, TARGET, *OUTPUTS) if name in tensors}
    renamed = rename({name: t for name, t in tensors.items() if name not in matrices}, NAMES.to_ours, LEFT_OUT)
    if renamed.unknown:
        name = renamed.unknown[0]
        raise UserError(_refusal(f"{name} {tuple(tensors[name].shape)} is unsupported"))
    missing = [name for name in (SOURCE, TARGET) if name not in matrices]
    if missing:
        raise UserError(_refusal(f"it has no {missing[0]}"))
    output = next((matrices[name] for name in OUTPUTS if name in matrices), matrices[TARGET])
    orders = row_order(len(matrices[SOURCE])), row_order(len(matrices[TARGET]))
    bias = output.new_zeros(len(orders[1]))
    bias[BOS] = layouts.MASKED_LOGIT
    weights = layouts.embeddings((matrices[SOURCE], matrices[TARGET], output), orders)
    return Adopted({**projections.join(renamed.tensors), **weights, "output_bias": bias}, {}, renamed.left_out)


def row_order(entries: int) -> list[int]:
    """For each of our entries (PAD, BOS, EOS, UNK, dictionary, <s>), its row in fairseq's embedding (`entries`, C)."""
    return [1, 2, 2, 3, *range(SPECIAL_ENTRIES, entries), 0]


def _refusal(reason: str) -> str:
    return (
        f"The checkpoint is in fairseq's layout, but not a plain Transformer ({reason}); give one with sinusoidal "
        "positions, and without adapters or norms on embeddings."
    )


def is_fairseq(tensors: dict[str, Any]) -> bool:
    """Whether a tensor has a name that fairseq's TransformerModel uses; torch.nn.Transformer uses such names, too."""
    return any(re.match(layouts.BLOCK + r"(self_attn|encoder_attn|fc1)\.", name) for name in tensors)
