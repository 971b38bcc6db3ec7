"""Plan the export of a masked language model, or of a classifier of texts, as one graph from tokens to logits."""

from collections.abc import Mapping
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn
from torch.export import Dim

from scripts.exporting import tokenizer_files
from scripts.exporting.plan import Comparison, Dimension, Graph, GraphFunction, Plan
from scripts.verify.comparison import relative_difference
from seq2seq.models.bert import Encoder
from seq2seq.tasks.masked_language_modelling import MaskedLanguageModelling
from seq2seq.tasks.sentence_classification import SentenceClassification
from seq2seq.tokenizers.vocabulary import VocabularyTokenizer

SEED = 0
SHAPES = ((1, 1), (2, 5), (3, 12), (2, 31))  # texts and tokens with which the files are compared
TEXTS = ("", "a", "A b  c", "naïve café, isn't it?", "3.14 €", "\t\n x", "日本 語", "<s> </s> [CLS]", "👍🏽!")
TOKENIZER = "tokenizer.json"


class NamedLogits(nn.Module):
    """A model that returns its logits as a tuple of one tensor, to which `Graph.outputs` gives a name."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, real: Tensor) -> tuple[Tensor]:
        """Tokens (B, N) int64, and which are not padding (B, N) boolean -> logits (B, N, V) or (B, K)."""
        return (self.model(tokens, real),)


def plan_masked(model: nn.Module, task: MaskedLanguageModelling) -> Plan:
    """Plan the export of a masked language model."""
    outputs = {"logits": "(batch, length, vocabulary): those of the mask entry's tokens fill the blanks"}
    return _plan(model, task.data.text_tokenizer(), outputs, {"kind": "masked language modelling"})


def plan_classes(model: nn.Module, task: SentenceClassification) -> Plan:
    """Plan the export of a classifier of texts."""
    outputs = {"logits": "(batch, classes): softmax makes them probabilities"}
    metadata = {"kind": "classification of texts", "classes": task.classes}
    return _plan(model, task.data.text_tokenizer(), outputs, metadata)


def _plan(model: nn.Module, tokenizer: VocabularyTokenizer, outputs: dict[str, str], metadata: dict[str, Any]) -> Plan:
    """Plan the export for any batch size, and texts of 1 to `model.longest` tokens."""
    longest = model.longest if isinstance(model, Encoder) else max(length for _, length in SHAPES)
    dimensions = {
        "batch": Dimension(Dim("batch", min=1), "1 or more"),
        "length": Dimension(Dim("length", min=1, max=longest), f"1 to {longest} tokens"),
    }
    inputs = _sample_texts(tokenizer, 3, min(7, longest))
    shapes: dict[str, list[str | int]] = {name: ["batch", "length"] for name in inputs}
    graph = Graph("model", NamedLogits(model), inputs, shapes, outputs)
    special = tokenizer.special_entries._asdict()
    about = {"file": TOKENIZER, "reader": "tokenizers.Tokenizer.from_file; encode(text).ids", "special_ids": special}
    content = tokenizer_files.vocabulary_json(tokenizer, begin=True)

    @torch.no_grad()
    def compare(functions: Mapping[str, GraphFunction]) -> list[Comparison]:
        comparisons = []
        for count, length in SHAPES:
            sample = _sample_texts(tokenizer, count, min(length, longest))
            (expected,) = graph.module(**sample)
            real = sample["real"] if expected.ndim == 3 else slice(None)  # the logits of padding have no meaning
            computed = functions["model"](*sample.values())["logits"]
            difference = relative_difference(computed[real], expected[real])
            comparisons.append(Comparison(f"{count} x {min(length, longest)}", "logits", difference))
        return comparisons

    rate = Comparison(f"{len(TEXTS)} texts", TOKENIZER, mismatch_rate(tokenizer, content))
    return Plan([graph], dimensions, {**metadata, "tokenizer": about}, {TOKENIZER: content}, [rate], compare)


def mismatch_rate(tokenizer: VocabularyTokenizer, exported_json: str) -> float:
    """Return the fraction of the texts that the exported tokenizer encodes differently from ours."""
    exported = tokenizers.Tokenizer.from_str(exported_json)
    texts = [*TEXTS, *(f"{text} {tokenizer.mask_text}." for text in TEXTS)]
    begin, end = tokenizer.special[:2]
    wrong = [text for text in texts if exported.encode(text).ids != [begin, *tokenizer.encode_with_blanks(text), end]]
    return len(wrong) / len(texts)


def _sample_texts(tokenizer: VocabularyTokenizer, count: int, length: int) -> dict[str, Tensor]:
    """Sample tokens of texts of `length` tokens and, except for the first, of fewer: (count, length) each."""
    random = torch.Generator().manual_seed(SEED + 100 * count + length)
    tokens = torch.randint(tokenizer.size, (count, length), generator=random)
    lengths = torch.randint(1, length + 1, (count, 1), generator=random)
    lengths[0] = length
    return {"tokens": tokens, "real": torch.arange(length) < lengths}
