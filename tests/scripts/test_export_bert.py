"""Exported masked language models and classifiers of texts used without Triptych."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from berts import bert, classifier, word_piece
from tokenizers import models, pre_tokenizers, trainers

from common.config.compose import configure
from common.files import checkpoint
from common.machine.seeds import generator
from scripts import export
from scripts.exporting import single_texts, tokenizer_files
from seq2seq.tokenizers.bpe import byte_alphabet
from seq2seq.tokenizers.byte_bpe import ByteBpe

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SMALL = ["model.width=16", "model.heads=2", "model.layers=2", "model.feedforward=24", "model.longest=12"]


def byte_bpe() -> ByteBpe:
    """A tokenizer as RoBERTa's."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=special, initial_alphabet=sorted(byte_alphabet()), show_progress=False
    )
    library.train_from_iterator(["a man is riding a horse"] * 5, trainer)
    model = json.loads(library.to_str())["model"]
    entries = [*sorted(model["vocab"], key=model["vocab"].get), "<mask>"]
    return ByteBpe({"entries": entries, "merges": model["merges"], "space_before": False})


@pytest.mark.parametrize("kind", ["bert", "bert_classifier"])
def test_files_give_the_models_logits_for_any_number_of_texts_and_tokens(kind: str, tmp_path: Path) -> None:
    tokenizer = word_piece()
    model: Any = bert(tokenizer.size) if kind == "bert" else classifier(tokenizer.size)
    state: dict[str, Any] = {"tokenizer": tokenizer.state()}
    state |= {"token_counts": []} if kind == "bert" else {"classes": ["a", "b", "c"]}
    config = configure("train", [f"model={kind}", *SMALL])
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": state, "config": config}
    checkpoint.save(tmp_path / "best.pt", content)
    assert export.main([f"checkpoint={tmp_path / 'best.pt'}"]) == 0

    folder = tmp_path / "best.export"
    description = json.loads((folder / "model.json").read_text())
    assert description["tokenizer"]["special_ids"]["mask"] == 4
    assert description.get("classes") == (None if kind == "bert" else ["a", "b", "c"])
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "the man [MASK] a dog"
    assert library.encode(text).ids == [2, *tokenizer.encode_with_blanks(text), 3]
    tokens = torch.randint(tokenizer.size, (4, 8), generator=generator("tokens"))
    real = torch.arange(8) < torch.tensor([[8], [3], [1], [7]])
    with torch.no_grad():
        expected = model(tokens, real)
    kept = real if kind == "bert" else slice(None)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (onnx_output,) = session.run(None, {"tokens": tokens.numpy(), "real": real.numpy()})
    torch.testing.assert_close(torch.from_numpy(onnx_output)[kept], expected[kept], rtol=0, atol=1e-4)
    (torch_output,) = torch.export.load(folder / "model.pt2").module()(tokens, real)
    torch.testing.assert_close(torch_output[kept], expected[kept], rtol=0, atol=1e-4)


def test_exported_tokenizers_give_our_ids() -> None:
    for tokenizer in (word_piece(), byte_bpe()):
        content = tokenizer_files.vocabulary_json(tokenizer, begin=True)
        assert single_texts.mismatch_rate(tokenizer, content) == 0
        assert single_texts.mismatch_rate(tokenizer, tokenizer_files.vocabulary_json(tokenizer, begin=False)) > 0.9
        library = tokenizers.Tokenizer.from_str(content)
        ids = tokenizer.encode("a man is riding")
        assert library.decode(ids) == tokenizer.decode(ids)
