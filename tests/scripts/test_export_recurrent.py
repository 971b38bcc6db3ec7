"""Exported recurrent translators used without Triptych: by onnxruntime and torch.export alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizing import BYTE_OPTIONS

from common.config.check import build
from common.config.compose import configure
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export
from seq2seq.tokenizers.bpe import Tokenizer

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NARROW = ["model.embedding_width=12", "model.width=12", "model.longest=40", "task.predict.longest_extra=9"]
CASES = {
    "rnn": ["model=rnn"],
    "rnn, lstm": ["model=rnn", "model.cell=lstm", "model.reverse_source=false"],
    "contextual": ["model=rnn_contextual", "model.maxout_width=12"],
    "bahdanau": ["model=rnn_bahdanau", "model.maxout_width=12", "model.attention_width=8", "model.cell=lstm"],
    "bahdanau, separate embeddings": [
        *("model=rnn_bahdanau", "model.maxout_width=8", "model.attention_width=8", "model.tied=none"),
        *("model.layers=2", "data.tokenizer.joint=false"),
    ],
    "luong": ["model=rnn_luong", "model.layers=2"],
    "luong, dot": ["model=rnn_luong", "model.score=dot", "model.input_feeding=false", "model.bidirectional=true"],
    "luong, concat": ["model=rnn_luong", "model.score=concat", "model.cell=lstm", "model.layers=2"],
}


def save_checkpoint(path: Path, *keys: str) -> Path:
    """Write a checkpoint of a small model with random tensors."""
    config = configure("train", [*keys, *NARROW, "task.predict.method=greedy"])
    tokenizer = Tokenizer.train([], BYTE_OPTIONS)
    joint = config["model"]["tied"] == "all"
    model = build(config["model"], vocabularies=(tokenizer.size, tokenizer.size), joint=joint)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator("export"))
    states = [tokenizer.state()] * (1 if joint else 2)
    content = {"step": 1, "model": dict(model.state_dict()), "average": None, "task": {"tokenizers": states}}
    checkpoint.save(path, {**content, "config": config})
    return path


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_and_torch_alone_give_our_translations(case: str, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "best.pt", *CASES[case])
    assert export.main([f"checkpoint={file}"]) == 0
    folder = tmp_path / "best.export"
    description = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    model, task = assembly.load(file, "trainer.device=cpu")
    batch = task.data.collate(
        [task.data.view(text, id=i) for i, text in enumerate(["Hello there", "12", "a naïve 日"])]
    )
    expected = [answer["tokens"] for answer in task.answers(model, batch)]
    assert len({tuple(tokens) for tokens in expected}) > 1 and max(map(len, expected)) > 3

    ids, limits = description["ids"], batch["source_lengths"].numpy() + 9
    for form in ("torch", "onnx"):
        translations = greedy(folder, form, batch, ids, limits, description["decoding"]["never"])
        assert translations == expected, form


def greedy(folder: Path, form: str, batch: dict, ids: dict, limits: np.ndarray, never: list[int]) -> list[list[int]]:
    """Greedy translations by the exported graphs, as model.json describes."""

    def call(name: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        if form == "onnx":
            session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
            assert [node.name for node in session.get_inputs()] == [*inputs]
            return session.run(None, inputs)
        graph = torch.export.load(folder / f"{name}.pt2").module()
        return [output.numpy() for output in graph(*(torch.from_numpy(value) for value in inputs.values()))]

    source, lengths = batch["source"].numpy(), batch["source_lengths"].numpy()
    state, *memory = call("encoder", {"source": source, "lengths": lengths})
    fixed = {"memory": memory[0], "lengths": lengths} if memory else {}
    tokens = np.full(len(source), ids["begin"])
    translations: list[list[int]] = [[] for _ in source]
    finished = np.zeros(len(source), bool)
    while not finished.all():
        logits, state = call("decoder", {"tokens": tokens, "state": state, **fixed})
        logits = logits.copy()
        logits[:, never] = -np.inf
        tokens = logits.argmax(-1)
        for i in np.flatnonzero(~finished):
            finished[i] = tokens[i] == ids["end"] or len(translations[i]) + 1 == limits[i]
            translations[i] += [] if finished[i] else [int(tokens[i])]
    return translations


@pytest.mark.slow
@pytest.mark.parametrize("case", ["rnn", "luong"])
def test_a_graph_holds_only_aten_operators_and_the_weights_that_it_needs(case: str, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "best.pt", *CASES[case])
    assert export.main([f"checkpoint={file}", "--format=torch"]) == 0
    for name, absent in (("encoder", "decoder."), ("decoder", "encoder.")):
        program = torch.export.load(tmp_path / "best.export" / f"{name}.pt2")
        assert not [key for key in program.state_dict if absent in key]
        modules = [module for module in program.graph_module.modules() if hasattr(module, "graph")]
        targets = [node.target for module in modules for node in module.graph.nodes if node.op == "call_function"]
        namespaces = {target.namespace for target in targets if isinstance(target, torch._ops.OpOverload)}
        assert namespaces == {"aten"} and len(targets) > 10
