"""Exported models in the hands of those who have no Triptych: onnxruntime, torch.export and `tokenizers` alone."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torchvision
from tokenizing import BYTE_OPTIONS
from torch import Tensor, nn

from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.files import checkpoint
from common.machine.seeds import generator
from common.train import assembly
from scripts import export
from scripts.exporting import graphs, tokenizer_files, whole_folder
from scripts.exporting.plan import Graph, Size
from seq2seq.tokenizers.bpe import Tokenizer
from seq2seq.tokenizers.marian import SentencePieces

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

FORMATS = ("torch", "onnx")
CLOSE = {"rtol": 0, "atol": 1e-5}  # probabilities and shares of an image; orders of fp32 sums give 1e-7
WORDS = replace(BYTE_OPTIONS, pieces="characters", vocabulary=320)
LINES = ["Hello there, 12 days ago in the night"] * 3 + ["Vor 12 Tagen, in der Nacht: 3,14 Euro"] * 3
SMALL_VIT = ["model=vit", "model.width=16", "model.layers=1", "model.heads=2", "model.feedforward=24"]
SMALL = {
    "vit": [*SMALL_VIT, "model.registers=1"],
    "detr": [
        *("model=detr", "model.width=16", "model.heads=2", "model.feedforward=24", "model.queries=7"),
        *("model.encoder_layers=1", "model.decoder_layers=2"),
    ],
    "seq2seq": [
        *("model=seq2seq", "model.width=16", "model.heads=2", "model.feedforward=24", "model.longest=40"),
        *("model.encoder_layers=1", "model.decoder_layers=2", "task.predict.longest_extra=9"),
        "task.predict.method=greedy",
    ],
}


def saved(path: Path, wing: str, *changes: str) -> Path:
    """A checkpoint of a small model, all of whose tensors are random."""
    config = configure("train", [*SMALL[wing], *changes])
    if wing == "vit":
        task: dict[str, Any] = {"classes": ["ant", "bee", "cat"]}
        sizes: dict[str, Any] = {"classes": 3, "channels": 1, "image_size": (8, 8)}
    elif wing == "detr":
        task = {"categories": [{"id": 10 * i, "name": f"thing {i}"} for i in range(3)]}
        sizes = {"classes": 3}
    else:
        tokenizer = Tokenizer.train(LINES, WORDS)
        task = {"tokenizers": [tokenizer.state()]}
        sizes = {"vocabularies": (tokenizer.size, tokenizer.size), "joint": True}
    model = build(config["model"], **sizes)
    drawn = generator("export", wing)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.normal_(std=0.3 if tensor.ndim < 2 else 2 * tensor[0].numel() ** -0.5, generator=drawn)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    content = {"step": 7, "model": dict(model.state_dict()), "average": None, "task": task, "config": config}
    checkpoint.save(path, content)
    return path


def run(*words: Any) -> int:
    return export.main([str(word) for word in words])


def called(folder: Path, name: str, form: str) -> Callable[..., list[Tensor]]:
    """A graph as a stranger calls it."""
    if form == "torch":
        module = torch.export.load(folder / f"{name}.pt2").module()
        return lambda *tensors: list(module(*tensors))
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def call(*tensors: Tensor) -> list[Tensor]:
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(found) for found in session.run(None, given)]

    return call


class Exported:
    """A folder, what model.json in it says, and the model that it is of."""

    def __init__(self, folder: Path, file: Path):
        self.folder = folder
        self.told = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.model, self.task = assembly.load(file, "trainer.device=cpu")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """A wing's export, made once for all tests that look at it."""
    made: dict[str, Exported] = {}

    def find(wing: str) -> Exported:
        if wing not in made:
            file = saved(tmp_path_factory.mktemp(wing) / "best.pt", wing)
            assert run(f"checkpoint={file}") == 0
            made[wing] = Exported(file.with_name("best.export"), file)
        return made[wing]

    return find


def prepared(image: np.ndarray, told: dict[str, Any]) -> Tensor:
    """A picture, uint8 (C, H, W), as model.json says that the graph wants it."""
    mean, std = (np.array(told["preprocessing"][name], np.float32)[:, None, None] for name in ("mean", "std"))
    return torch.from_numpy(((image / np.float32(255) - mean) / std).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_detector_finds_for_strangers_what_it_finds_for_us(exported, form):
    """Two pictures of different sizes in one padded batch, from uint8 to pixels of the original."""
    one = exported("detr")
    drawn = np.random.default_rng(0)
    pictures = [drawn.integers(0, 256, size=(3, *size), dtype=np.uint8) for size in ((64, 40), (35, 64))]
    batch = one.task.data.collate([one.task.data.view(torch.from_numpy(image), Path("a.png")) for image in pictures])
    images, sizes = torch.zeros(2, 3, 64, 64), torch.tensor([image.shape[1:] for image in pictures])
    assert torch.equal(batch["sizes"], sizes) and batch["padded"], "they are as large as evaluation makes them"
    for row, picture in zip(images, pictures, strict=True):
        row[:, : picture.shape[1], : picture.shape[2]] = prepared(picture, one.told)
    found = dict(zip(("scores", "labels", "boxes"), called(one.folder, "model", form)(images, sizes), strict=True))
    for i, answer in enumerate(one.task.predict(one.model, batch)):
        height, width = pictures[i].shape[1:]
        pixels = found["boxes"][i] * torch.tensor([width, height, width, height])
        torch.testing.assert_close(pixels, answer["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(found["scores"][i], answer["scores"], **CLOSE)
        assert torch.equal(found["labels"][i], answer["labels"])
    assert len({tuple(row) for row in found["boxes"].flatten(0, 1).tolist()}) == 14, "every query answers otherwise"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_padding_changes_no_answer_of_an_exported_detector(exported, form):
    call = called(exported("detr").folder, "model", form)
    image, size = torch.randn(1, 3, 45, 71, generator=generator("pad")), torch.tensor([[45, 71]])
    batch = torch.zeros(3, 3, 90, 100)
    batch[1, :, :45, :71] = image[0]
    batch[[0, 2]] = torch.randn(2, 3, 90, 100, generator=generator("others"))
    scores, _, boxes = call(batch, torch.tensor([[90, 100], [45, 71], [90, 100]]))
    alone = call(image, size)
    torch.testing.assert_close((scores[1:2], boxes[1:2]), (alone[0], alone[2]), **CLOSE)
    whole = call(batch[1:2], torch.tensor([[90, 100]]))
    assert (whole[2] - alone[2]).abs().max() > 1e-3, "what the sizes say matters"


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_classifier_answers_strangers_as_it_answers_us(exported, form):
    one = exported("vit")
    pictures = np.random.default_rng(1).integers(0, 256, size=(5, 1, 8, 8), dtype=np.uint8)
    batch = {"ids": [*range(5)], "images": torch.from_numpy(pictures), "labels": torch.full((5,), -1)}
    expected = torch.stack([a["log_probabilities"] for a in one.task.predict(one.model, batch)])
    images = torch.stack([prepared(picture, one.told) for picture in pictures])
    (logits,) = called(one.folder, "model", form)(images)
    torch.testing.assert_close(logits.log_softmax(-1), expected, **CLOSE)
    assert one.told["classes"] == ["ant", "bee", "cat"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_a_classifier_takes_sizes_that_no_one_tried(exported, form):
    one = exported("vit")
    call = called(one.folder, "model", form)
    for shape in ((1, 1, 4, 4), (7, 1, 22, 6), (2, 1, 8, 30)):
        images = torch.randn(shape, generator=generator("sizes", *shape))
        with torch.no_grad():
            torch.testing.assert_close(call(images)[0], one.model(images), **CLOSE)


@pytest.mark.slow
def test_onnxruntime_and_tokenizers_alone_translate_as_we_do(exported):
    one = exported("seq2seq")
    texts = ["Hello there", "12 days ago", "in the night, 3,14 Euro", "a", "naïve 日本"]
    batch = one.task.data.collate([one.task.data.view(text, id=i) for i, text in enumerate(texts)])
    expected = [answer["tokens"] for answer in one.task.predict(one.model, batch)]
    assert len({tuple(tokens) for tokens in expected}) > 3 and max(map(len, expected)) > 10

    ids, most = one.told["ids"], one.told["decoding"]
    tokenizer = tokenizers.Tokenizer.from_file(str(one.folder / one.told["tokenizer"]["source"]))
    rows = [tokenizer.encode(text).ids for text in texts]
    lengths = np.array([len(row) for row in rows])
    source = np.full((len(rows), lengths.max()), ids["padding"])
    for i, row in enumerate(rows):
        source[i, : len(row)] = row
    encoder, decoder = (
        onnxruntime.InferenceSession(one.folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        for name in ("encoder", "decoder")
    )
    (memory,) = encoder.run(None, {"source": source, "lengths": lengths})
    past, tokens = memory[..., :0, :], np.full(len(rows), ids["begin"])
    limits = lengths + 9
    assert most["most_tokens"] == "1 x source_length + 9, the end among them"
    found: list[list[int]] = [[] for _ in rows]
    over = np.zeros(len(rows), bool)
    while not over.all():
        given = {"tokens": tokens, "past": past, "memory": memory, "lengths": lengths}
        logits, past = decoder.run(None, given)
        logits[:, most["never"]] = -np.inf
        tokens = logits.argmax(-1)
        for i in np.flatnonzero(~over):
            over[i] = tokens[i] == ids["end"] or len(found[i]) + 1 == limits[i]
            found[i] += [] if over[i] else [int(tokens[i])]
    assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("wing", SMALL)
def test_what_is_told_of_the_graphs_is_what_they_say_themselves(exported, wing):
    one = exported(wing)
    assert one.told["checkpoint"] == "best.pt" and one.told["weights"] == "step 7, raw"
    assert {row["file"] for row in one.told["compared"]["rows"]} >= {*FORMATS}
    assert all(row["difference"] < one.told["compared"]["limit"] for row in one.told["compared"]["rows"])
    for graph in one.told["graphs"].values():
        session = onnxruntime.InferenceSession(one.folder / graph["files"]["onnx"])
        assert [one.name for one in session.get_outputs()] == [*graph["outputs"]]
        for given in session.get_inputs():
            assert given.shape == graph["inputs"][given.name]["shape"]
        assert {name for shape in graph["inputs"].values() for name in shape["shape"] if isinstance(name, str)} <= {
            *one.told["sizes"]
        }


@pytest.mark.slow
@pytest.mark.parametrize("wing", SMALL)
def test_a_graph_holds_only_operators_that_every_torch_has(exported, wing):
    """oneDNN's own products, which eager takes on the CPU, would tie it to builds of PyTorch that have them."""
    one = exported(wing)
    for graph in one.told["graphs"].values():
        program = torch.export.load(one.folder / graph["files"]["torch"])
        graph_modules = [module for module in program.graph_module.modules() if hasattr(module, "graph")]
        used = [node.target for module in graph_modules for node in module.graph.nodes if node.op == "call_function"]
        named = {target.namespace for target in used if isinstance(target, torch._ops.OpOverload)}
        assert named == {"aten"} and len(used) > 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wing", "changes"),
    [
        ("vit", ["model.pooling=mean_then_norm", "model.embedding=multiply", "model.blocks.qk_norm=true"]),
        ("vit", ["model.positions.resample=bilinear_corners", "model.representation=5", "model.patch_size=4"]),
        ("vit", ["model.patch_size=8"]),  # a grid of one patch, which is a special case
        ("detr", ["model.positions.kind=learned", "model.pre_norm=false", "model.auxiliary=false"]),
        ("detr", ["model.official_padding=true", "model.backbone.name=resnet18"]),
        ("detr", ["model.backbone.name=resnet50", "model.backbone.dilation=true"]),
        ("seq2seq", ["model.tied=none", "model.output_bias=true", "model.blocks.pre_norm=false"]),
        ("seq2seq", ["model.positions.layout=halves_t2t", "model.positions.first=2", "model.longest=5"]),
    ],
)
def test_every_kind_of_a_model_is_exported(tmp_path, capsys, wing, changes):
    assert run(f"checkpoint={saved(tmp_path / 'best.pt', wing, *changes)}") == 0
    said = capsys.readouterr().out
    assert "same answers: the limit is 0.0001" in said and {*FORMATS} <= {*said.split()}


def altered(program: Any) -> Any:
    """A traced model, one number of one bias of which is a hundredth off."""
    name = next(name for name in program.state_dict if name.endswith("contract.bias"))
    bias = program.state_dict[name].clone()
    bias[0] += 0.01
    program.state_dict[name] = nn.Parameter(bias, requires_grad=False)
    return program


@pytest.mark.parametrize("form", FORMATS)
def test_another_answer_is_told_and_leaves_nothing(tmp_path, capsys, monkeypatch, form):
    file = saved(tmp_path / "best.pt", "vit")
    honest = graphs.write
    monkeypatch.setattr(graphs, "write", lambda program, *rest: honest(altered(program), *rest))
    assert run(f"checkpoint={file}", "--format", form) == 1
    assert "OTHER ANSWERS: logits differ by 0.0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_an_export_may_be_written_again_and_a_failed_one_leaves_the_old(tmp_path, capsys, monkeypatch):
    file, folder = saved(tmp_path / "best.pt", "vit"), tmp_path / "for others"
    for _ in range(2):
        assert run(f"checkpoint={file}", "--output", folder, "--format=torch") == 0
    assert {path.name for path in folder.iterdir()} == {"model.json", "model.pt2"}
    before = {path: path.read_bytes() for path in folder.iterdir()}
    honest = graphs.write

    def full(*arguments: Any) -> None:
        honest(*arguments)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(graphs, "write", full)
    capsys.readouterr()
    assert run(f"checkpoint={file}", "--output", folder, "--format=torch") == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "for others"}


def test_without_the_extra_there_is_one_sentence_and_torchs_format(tmp_path, capsys, monkeypatch):
    file = saved(tmp_path / "best.pt", "vit")
    honest = export.util.find_spec
    monkeypatch.setattr(export.util, "find_spec", lambda name, *more: name != "onnxscript" and honest(name, *more))
    assert run(f"checkpoint={file}") == 2
    said = capsys.readouterr().err
    assert said == (
        'onnxscript is not installed, which ONNX needs: pip install "triptych[export]", or give --format torch.\n'
    )
    assert not file.with_name("best.export").exists()
    assert run(f"checkpoint={file}", "--format", "torch") == 0
    assert [*json.loads((tmp_path / "best.export/model.json").read_text())["versions"]] == ["torch"]


def test_a_file_of_another_program_is_exported_as_the_model_that_it_is_named(tmp_path):
    sizes = {"image_size": 16, "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}
    theirs = torchvision.models.VisionTransformer(**sizes, num_classes=4).eval()
    drawn = generator("torchvision")
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3, generator=drawn)
    file = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(theirs.state_dict(), file)
    words = [*SMALL_VIT, "data=imagefolder", "data.image_size=16", "model.patch_size=8"]
    assert run(f"checkpoint={file}", *words, "--format=torch") == 0
    images = torch.randn(2, 3, 16, 16, generator=drawn)
    (found,) = called(tmp_path / "theirs.export", "model", "torch")(images)
    with torch.no_grad():
        torch.testing.assert_close(found, theirs(images), rtol=0, atol=1e-4)  # of logits of some tens


def test_mistakes_end_in_one_sentence_and_code_2(tmp_path, capsys):
    file = saved(tmp_path / "best.pt", "vit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/diary.txt").touch()
    for words, expected in {
        (): "export.py needs checkpoint=FILE",
        (f"checkpoint={tmp_path / 'no.pt'}",): "there is no such file",
        (f"checkpoint={file}", "model.widht=3"): "did you mean model.width?",
        (f"checkpoint={file}", "weights=ema"): "kept no average",
        (f"checkpoint={file}", f"--output={tmp_path / 'full'}"): "holds something else already; give a new folder",
        (f"checkpoint={file}", f"--output={file}"): "holds something else already; give a new folder",
        (f"checkpoint={file}", f"--output={file / 'in'}", "--format=torch"): "cannot be written (Not a directory)",
    }.items():
        assert run(*words) == 2, words
        printed = capsys.readouterr()
        assert expected in printed.err and printed.err.count("\n") == 1, printed.err
    with pytest.raises(SystemExit) as left:
        run(f"checkpoint={file}", "--format=caffe")
    assert left.value.code == 2 and "caffe: expected torch, onnx, or torch,onnx" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"best.pt", "full"}


@pytest.mark.parametrize("asks", [lambda x: x.new_zeros(len(x), 1), lambda x: x if x.shape[0] > 2 else -x])
def test_a_model_that_asks_for_the_size_of_a_batch_is_told_so(asks):
    class Asking(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (images + asks(images),)

    graph = Graph("model", Asking(), {"images": torch.zeros(3, 4)}, {"images": ["batch", 4]}, {"logits": ""})
    sizes = {"batch": Size(torch.export.Dim("batch", min=1), "")}
    with pytest.raises(UserError, match=r"cannot be traced for every batch \(.*batch.*\); it must not ask how large"):
        graphs.trace(graph, sizes)


def test_imported_sentence_pieces_come_as_a_list_by_id():
    """The files that cut a text were published with the model; what their pieces' numbers are is ours."""
    shown = ["<pad>", "<s>", "</s>", "<unk>"]
    content = {"entries": [*shown, "\u2581a", "\u2581b"], "pieces": [["?", 0.0], ["\u2581b", -1.0], ["\u2581a", -2.0]]}
    content |= {"unknown": 0, "charsmap": "", "single_spaces": True, "space_before": True, "joint": True}
    tokenizer = SentencePieces(content)
    files, told, rows = tokenizer_files.make(tokenizer, tokenizer)
    pieces = json.loads(files[told["source"]])
    assert [pieces[i] for i in tokenizer.encode("b a")] == ["\u2581b", "\u2581a"]
    assert {*files} == {told["source"], told["target"]} and not rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"byte_fallback": False},
        {"normalization": "nfkc", "lowercase": True},
        {"pieces": "bytes", "single_digits": False},
        {"coverage": 0.9, "normalization": "nfc"},
    ],
    ids=str,
)
def test_the_library_cuts_texts_as_our_tokenizer_does(changes):
    vocabulary = 70 if changes.get("byte_fallback") is False else 300
    ours = Tokenizer.train(LINES, replace(WORDS, vocabulary=vocabulary, **changes))
    theirs = tokenizers.Tokenizer.from_str(tokenizer_files.library_form(ours))
    letters = "aeGHäß 12,.\t\n€日\u00a0\u0301\U000100e4\U0010ffff<>s/"
    drawn = np.random.default_rng(0)
    texts = ["".join(drawn.choice([*letters], size=n)) for n in (1, 2, 3, 5, 9) for _ in range(200)]
    for text in [*texts, *LINES, *tokenizer_files.TEXTS]:
        ids = ours.encode(text)
        assert theirs.encode(text).ids == [*ids, ours.eos], repr(text)
        assert theirs.decode(ids) == ours.decode(ids), repr(text)
    assert theirs.decode([0, 1, *ours.encode("ago"), 2]) == "ago"


def test_a_tokenizer_that_cuts_otherwise_is_noticed(monkeypatch):
    ours = Tokenizer.train(LINES, WORDS)
    assert tokenizer_files.make(ours, ours)[2][0].difference == 0
    monkeypatch.setattr(tokenizer_files, "_normalizers", lambda options: [])
    assert tokenizer_files.make(ours, ours)[2][0].difference > 0.2


def test_a_folder_is_whole_or_not_there(tmp_path):
    output = tmp_path / "out"
    with pytest.raises(KeyError), whole_folder.replaced(output) as draft:
        (draft / "half").touch()
        raise KeyError
    assert not [*tmp_path.iterdir()]
    for text in ("one", "two"):
        with whole_folder.replaced(output) as draft:
            (draft / text).write_text(text)
        assert [path.name for path in output.iterdir()] == [text] and [*tmp_path.iterdir()] == [output]


def test_help_says_what_it_is_for(capsys):
    with pytest.raises(SystemExit) as left:
        run("--help")
    assert left.value.code == 0 and "checkpoint=FILE [key=value ...]" in capsys.readouterr().out
