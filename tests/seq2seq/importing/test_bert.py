"""Files of transformers' BERT and RoBERTa give the logits, gradients and losses of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from berts import bert, classifier, redrawn, word_piece
from torch import Tensor

from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from seq2seq.importing.bert import adopt
from seq2seq.models.bert import BertBlockOptions
from seq2seq.tokenizers.stored import restore

transformers = pytest.importorskip("transformers")

ENTRIES = 40
OPTIONS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
OPTIONS |= {"vocab_size": ENTRIES, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPTIONS |= {"attn_implementation": "eager"}
OURS: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {
        "first_position": 2,
        "token_types": 1,
        "blocks": BertBlockOptions(dropout=0.0, attention_dropout=0.0, norm_eps=1e-5),
    },
}
EXACT = {torch.float32: 1e-5, torch.float64: 1e-10}  # sums of some ten values of about one, in another order
LENGTHS = (9, 4, 1)


def peer(kind: str, head: str = "MaskedLM", **options: Any) -> Any:
    if kind == "bert":
        config = transformers.BertConfig(**OPTIONS, max_position_embeddings=12, **options)
        return redrawn(getattr(transformers, f"BertFor{head}")(config))
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "layer_norm_eps": 1e-5}
    config = transformers.RobertaConfig(**OPTIONS, max_position_embeddings=14, type_vocab_size=1, **special, **options)
    return redrawn(getattr(transformers, f"RobertaFor{head}")(config))


def texts(kind: str) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and which are real; no real token is RoBERTa's padding."""
    tokens = torch.randint(4, ENTRIES, (3, 9), generator=generator("texts"))
    real = torch.arange(9) < torch.tensor(LENGTHS)[:, None]
    return tokens.masked_fill(~real, 1 if kind == "roberta" else 0), real


def imported(kind: str, file: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> Any:
    adopted = adopt(file, None)
    model = bert(ENTRIES, **OURS[kind]).to(dtype)
    model.load_state_dict(adopted.weights)
    return model


kinds = pytest.mark.parametrize("kind", OURS)


@kinds
@pytest.mark.parametrize("dtype", EXACT)
def test_logits_gradients_and_the_loss_on_fixed_masks_are_those_of_transformers(kind, dtype, tmp_path):
    theirs = peer(kind)
    theirs.save_pretrained(tmp_path)
    file = checkpoint.load(tmp_path / "model.safetensors")
    assert not any("decoder" in name for name in file), "transformers 5 does not write the tied output"
    model, theirs = imported(kind, file, dtype), theirs.to(dtype)
    tokens, real = texts(kind)
    selected = torch.tensor([1, 5, 9, 11, 18])  # among the 27 tokens
    labels = torch.full((27,), -100)
    labels[selected] = torch.randint(ENTRIES, (5,), generator=generator("labels"))
    output = theirs(tokens, attention_mask=real.long(), labels=labels.view(3, 9))
    expected, loss = output.logits.detach(), output.loss
    assert expected[real].std() > 0.3
    logits = model(tokens, real).detach()
    torch.testing.assert_close(logits[real], expected[real], rtol=0, atol=EXACT[dtype] * float(expected.abs().max()))
    ours = F.cross_entropy(model(tokens, real, selected), labels[selected])
    torch.testing.assert_close(ours, loss, rtol=EXACT[dtype], atol=EXACT[dtype])
    loss.backward()
    ours.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    expected_gradients = adopt(gradients, None).weights
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        difference = (parameter.grad - expected_gradients[name]).abs().max()
        assert difference <= 10 * EXACT[dtype] * max(1.0, float(parameter.grad.abs().max())), name


@kinds
@torch.no_grad()
def test_a_classifier_gives_the_logits_of_transformers_and_its_names_of_classes(kind, tmp_path):
    names = {0: "bad", 1: "neutral", 2: "good"}
    theirs = peer(kind, "SequenceClassification", id2label=names, label2id={name: i for i, name in names.items()})
    theirs.save_pretrained(tmp_path)
    adopted = adopt(checkpoint.load(tmp_path / "model.safetensors"), tmp_path, classifies=True)
    assert adopted.task_state["classes"] == ["bad", "neutral", "good"] and adopted.left_out == []
    model = classifier(ENTRIES, **OURS[kind])
    model.load_state_dict(adopted.weights)
    tokens, real = texts(kind)
    expected = theirs(tokens, attention_mask=real.long()).logits
    torch.testing.assert_close(model(tokens, real), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@torch.no_grad()
def test_a_published_file_is_read_with_its_old_names_and_what_it_has_in_addition():
    """The files of 2018 and 2019 hold gamma and beta, tied matrices, indices of positions, pooler and next sentence."""
    theirs = peer("bert", "PreTraining")
    file = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    file["cls.predictions.decoder.weight"] = file["bert.embeddings.word_embeddings.weight"].clone()
    file["cls.predictions.decoder.bias"] = file["cls.predictions.bias"].clone()
    file["bert.embeddings.position_ids"] = torch.arange(12)[None]
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in file.items()
    }
    assert sum(name.endswith("gamma") for name in old) == 6
    adopted = adopt(old, None)
    pooler = {f"bert.pooler.dense.{leaf}" for leaf in ("weight", "bias")}
    others = {"bert.embeddings.position_ids", *(f"cls.seq_relationship.{leaf}" for leaf in ("weight", "bias"))}
    assert {*adopted.left_out} == pooler | others
    tokens, real = texts("bert")
    expected = theirs(tokens, attention_mask=real.long()).prediction_logits
    torch.testing.assert_close(imported("bert", old)(tokens, real)[real], expected[real], rtol=0, atol=1e-4)
    of_classifier = adopt(old, None, classifies=True)
    assert {"representation.weight", "representation.bias"} <= of_classifier.weights.keys()
    assert of_classifier.task_state == {"classes": []}
    assert "cls.predictions.bias" in of_classifier.left_out and "output_bias" not in of_classifier.weights


def test_a_file_without_prefix_and_in_half_precision_is_read():
    file = peer("bert").state_dict()
    bare = {name.removeprefix("bert."): tensor for name, tensor in file.items() if name.startswith("bert.")}
    expected = adopt({name: tensor.half() for name, tensor in file.items()}, None).weights
    weights = adopt({name: tensor.half() for name, tensor in bare.items()}, None).weights
    head = {"transform.weight", "transform.bias", "transform_norm.weight", "transform_norm.bias", "output_bias"}
    assert expected.keys() - weights.keys() == head
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name])


def test_every_number_of_a_file_is_used_exactly_once():
    """The elements of a file are the numbers from 0 upwards; the imported elements must be the same numbers."""
    for kind in OURS:
        file, count = {}, 0
        for name, tensor in peer(kind).state_dict().items():
            if "position_ids" in name or "decoder" in name or "token_type_ids" in name:
                continue
            file[name] = torch.arange(count, count + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
            count += tensor.numel()
        numbers = torch.cat([tensor.flatten() for tensor in adopt(file, None).weights.values()])
        assert torch.equal(numbers.sort().values, torch.arange(count, dtype=torch.float64))


def test_a_roberta_classifier_does_not_use_the_pooler():
    file = peer("roberta", "SequenceClassification").state_dict()
    file = {**file, "roberta.pooler.dense.weight": torch.zeros(16, 16), "roberta.pooler.dense.bias": torch.zeros(16)}
    adopted = adopt(file, None, classifies=True)
    assert {"roberta.pooler.dense.weight", "roberta.pooler.dense.bias"} <= {*adopted.left_out}
    assert torch.equal(adopted.weights["representation.weight"], file["classifier.dense.weight"])
    assert adopted.task_state["classes"] == ["class 0", "class 1"]


def test_the_tokenizer_beside_a_file_is_read_and_that_of_another_model_is_refused(tmp_path: Path):
    tokenizer = word_piece()
    (tmp_path / "vocab.txt").write_text("\n".join(tokenizer.entries) + "\n", encoding="utf-8")
    file = bert_file(tokenizer.size)
    adopted = adopt(file, tmp_path)
    assert restore(adopted.task_state["tokenizer"]).state() == tokenizer.state() and len(adopted.notes) == 1
    with pytest.raises(UserError, match=r"vocab.txt is the tokenizer of another model: it has 70 entries, and the"):
        adopt(bert_file(tokenizer.size + 1), tmp_path)
    assert adopt(file, tmp_path / "empty").task_state == {}
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "a"}}))
    assert adopt({**file, "classifier.weight": torch.zeros(2, 16), "classifier.bias": torch.zeros(2)}, tmp_path,
                 classifies=True).task_state["classes"] == ["class 0", "class 1"]  # fmt: skip


def bert_file(entries: int) -> dict[str, Tensor]:
    file: dict[str, Tensor] = peer("bert").state_dict()
    name = "bert.embeddings.word_embeddings.weight"
    without_output = {name: t for name, t in file.items() if "decoder" not in name and "predictions.bias" not in name}
    return {**without_output, name: torch.randn(entries, 16)}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["distilbert.transformer.layer.0.attention.q_lin.weight"], "a DistilBERT and neither a BERT nor a RoBERTa"),
        (["transformer.wte.weight"], "is a language model"),
        (["embeddings.tokens.weight"], "bare weights of this program's own"),
        (["bert.embeddings.word_embeddings.weight", "bert.x.weight"], "it has bert.x.weight"),
        (["x.weight"], "something else"),
    ],
)
def test_files_of_other_models_are_refused(names, message):
    with pytest.raises(UserError, match=message):
        adopt(dict.fromkeys(names, torch.zeros(2, 2)), None)


def test_an_output_of_its_own_is_refused(tmp_path: Path):
    file = dict(peer("bert").state_dict())
    file["cls.predictions.decoder.weight"] = torch.zeros(ENTRIES, 16)
    safetensors.torch.save_file(
        {name: tensor.contiguous().clone() for name, tensor in file.items()}, tmp_path / "m.safetensors"
    )
    with pytest.raises(UserError, match="has an output matrix of its own"):
        adopt(checkpoint.load(tmp_path / "m.safetensors"), None)
