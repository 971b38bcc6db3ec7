"""Small BERTs and WordPieces for tests."""

from typing import Any

import torch
from torch import nn

from common.machine.seeds import generator
from seq2seq.models.bert import Bert, BertBlockOptions, BertClassifier
from seq2seq.tokenizers.word_piece import WordPiece

WORDS = "a the man woman dog horse is runs rides sees big small old red blue and near under on".split()
SHAPE: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "feedforward": 24, "longest": 12}
SHAPE |= {"first_position": 0, "token_types": 2}
BLOCKS = BertBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-12)


def sentences(count: int, seed: int = 0, longest: int = 8) -> list[str]:
    """Random sentences of 2 to `longest` words."""
    rng = generator("sentences", seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=rng).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=rng).tolist()) for n in lengths]


def word_piece(vocabulary: int = 70) -> WordPiece:
    return WordPiece.train(sentences(100), vocabulary, lowercase=True)


def redrawn(model: nn.Module) -> Any:
    """The model with all tensors sampled, so that none keeps initial zeros or ones."""
    random = generator("redrawn")
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            scale = 1.5 * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.normal_(std=scale, generator=random)
    return model.eval()


def bert(vocabulary: int = 40, **changed: Any) -> Bert:
    model: Bert = redrawn(Bert(vocabulary=vocabulary, **{**SHAPE, "blocks": BLOCKS, **changed}))
    return model


def classifier(vocabulary: int = 40, classes: int = 3, **changed: Any) -> BertClassifier:
    shape = {**SHAPE, "blocks": BLOCKS, **changed}
    model: BertClassifier = redrawn(BertClassifier(vocabulary=vocabulary, classes=classes, **shape))
    return model
