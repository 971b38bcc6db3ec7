"""checkpoint=NAME: published weights are downloaded from a server on loopback, and imply a model and constants."""

import hashlib
import importlib
import io
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from common.cli import main as cli
from common.config import published
from common.config.check import build
from common.config.compose import configure
from common.errors import UserError
from common.files import download
from common.files.run_folder import config_text
from common.train import assembly
from common.weights import fetching
from detr.importing import official
from tests.file_server import FileServer, serving

SMALL = {
    "model.queries": 5,
    "model.width": 32,
    "model.feedforward": 32,
    "model.encoder_layers": 1,
    "model.decoder_layers": 1,
    "data.augmentation.eval_size": 64,
    "data.crop_ratio": 0.9,  # a key that data=coco lacks
}
Run = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def weights() -> bytes:
    """A small ResNet-18 DETR in the official layout."""
    keys = [f"{key}={value}" for key, value in SMALL.items() if key.startswith("model.")]
    torch.manual_seed(0)
    model = build(configure("train", ["model=detr_r18", *keys])["model"], classes=91)
    buffer = io.BytesIO()
    torch.save(official.export(model.state_dict()), buffer)
    return buffer.getvalue()


@pytest.fixture
def server(weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """A server with `weights`, which the table names detr_small, in an empty working folder with a cache beside it."""
    monkeypatch.setattr(download, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        server.files["/detr-small.pth"] = weights
        write_table(tmp_path, server, hashlib.sha256(weights).hexdigest()[:8])
        monkeypatch.setattr(published, "TABLE", tmp_path / "weights.yaml")
        Image.new("RGB", (64, 48), (200, 30, 30)).save("photo.jpg")
        yield server


def write_table(folder: Path, server: FileServer, digits: str | None) -> None:
    files = [{"address": f"{server.address}/detr-small.pth", "hash": digits}]
    entry = {"publisher": "someone", "licence": "CC0", "files": files, "model": "detr_r18", "constants": SMALL}
    (folder / "weights.yaml").write_text(yaml.safe_dump({"detr_small": entry, "detr_large": entry}))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a door in this process; returns its stdout and stderr."""

    def run(name: str, *arguments: str, code: int = 0) -> tuple[str, str]:
        module = importlib.import_module(name)
        with pytest.raises(SystemExit) as exit_info:
            cli.launch(getattr(module, name), name, getattr(module, "stored_config", None), arguments)
        outputs = capsys.readouterr()
        assert exit_info.value.code == code, outputs
        assert "Traceback" not in outputs.err
        return outputs.out, outputs.err

    return run


PREDICT = ("predict", "checkpoint=detr_small", "input=photo.jpg")


def test_predict_needs_only_a_name_and_an_input(server: FileServer, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cache" / "weights" / "detr_small" / "detr-small.pth"
    out, err = run(*PREDICT)
    assert "photo.jpg" in out and Path("predictions/photo.jpg.boxes.json").exists()
    lines = err.splitlines()
    assert lines[0].startswith("checkpoint=detr_small sets model=detr_r18 data.augmentation.eval_size=64 model.decod")
    assert "crop" not in lines[0]
    assert lines[1] == f"downloading {server.address}/detr-small.pth to {file}"
    assert "SHA-256" in lines[2] and lines[3] == f"weights   detr_small of someone (CC0), {file}: imported"
    _, err = run(*PREDICT, "model.queries=5")
    assert len(server.requests) == 1 and "downloading" not in err and "queries" not in err.splitlines()[0]


def test_a_sentence_says_where_to_put_the_file(server: FileServer, run: Run, weights: bytes) -> None:
    del server.files["/detr-small.pth"]
    _, err = run(*PREDICT, code=2)
    path = Path(err.rstrip(".\n").rpartition(" put it at ")[2])
    assert "404 Not Found" in err and path.name == "detr-small.pth"
    path.write_bytes(weights)
    run(*PREDICT)
    path.write_bytes(weights[:-1])
    _, err = run(*PREDICT, code=2)
    assert f"{path} has the SHA-256 " in err and "delete it to download it again" in err


def test_a_cut_download_goes_on_and_each_failure_is_one_sentence(server: FileServer, run: Run, weights: bytes) -> None:
    """Cut for good, busy, altered, and without a server; then the same line succeeds from where the cut one ended."""
    server.cut_after = [len(weights) // 2, 0, 0, 0]
    assert "the same command continues from there" in run(*PREDICT, code=2)[1]
    server.codes = [503] * 3
    assert "the server answers 503" in run(*PREDICT, code=2)[1]
    server.cut_after = [10]
    run(*PREDICT)
    assert server.requests[-1][1] == f"bytes={len(weights) // 2 + 10}-"
    Path("again").mkdir()
    server.files["/detr-small.pth"] = weights[::-1]
    _, err = run(*PREDICT, "cache_dir=again", code=2)
    assert "could not be downloaded (the file has the SHA-256 " in err and not list(Path("again").rglob("*.pth"))


def test_without_a_network_one_sentence_names_the_address_and_where_to_put_the_file(
    server: FileServer, run: Run, weights: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_names(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    _, err = run(*PREDICT, code=2)
    sentence = err.splitlines()[-1]
    assert sentence.startswith(f"{server.address}/detr-small.pth could not be downloaded (no connection: ")
    path = Path(sentence.rstrip(".").rpartition(" put it at ")[2])
    path.write_bytes(weights)
    run(*PREDICT)


def test_without_a_stated_hash_another_layout_is_refused(server: FileServer, run: Run, tmp_path: Path) -> None:
    write_table(tmp_path, server, None)
    server.files["/detr-small.pth"] = b"<html>Not here</html>"
    assert "is no PyTorch checkpoint" in run(*PREDICT, code=2)[1]


def test_nothing_is_downloaded_for_a_wrong_command(server: FileServer, run: Run) -> None:
    assert "did you mean queries" in run(*PREDICT, "model.querys=3", code=2)[1].replace("model.", "")
    assert "eval_size: 64" in run("predict", "checkpoint=detr_small", "input=a", "--cfg", "job")[0]
    assert not server.requests


@pytest.mark.parametrize("door", ["train", "evaluate", "predict"])
def test_an_unknown_name_lists_the_nearest(server: FileServer, run: Run, door: str) -> None:
    _, err = run(door, "checkpoint=detr_smal", code=2)
    reason = "there is no such file, and no published weights have this name"
    assert err == f"checkpoint=detr_smal: {reason}; did you mean detr_small?\n"


def test_an_existing_path_wins_over_the_name(server: FileServer, run: Run) -> None:
    Path("detr_small").write_text("")
    _, err = run(*PREDICT, "model=detr_r18", code=2)
    assert "detr_small is empty" in err and not server.requests
    Path("detr_small").write_bytes(server.files["/detr-small.pth"])
    sizes = [f"{key}={value}" for key, value in SMALL.items() if key != "data.crop_ratio"]
    _, err = run(*PREDICT, "model=detr_r18", *sizes)
    assert f"is the file {Path('detr_small').absolute()}, and not the published weights of this name" in err
    assert "weights   detr_small: imported" in err and not server.requests


def test_a_run_starts_from_a_name_and_its_config_repeats_it(server: FileServer, real_data: Any) -> None:
    folder = real_data("coco_mini")
    files = [f"data.{split}.images={folder}/images" for split in ("train", "val", "test")]
    files += [f"data.{split}.annotations={folder}/val.json" for split in ("train", "val", "test")]
    config = configure("train", ["checkpoint=detr_small", *files])
    line = assembly.assemble(config).weights_line
    assert line.startswith("weights   detr_small of someone (CC0), ") and "re-initialised: class_head.weight" in line
    Path("run").mkdir()
    Path("run/config.yaml").write_text(config_text(config))
    stored = yaml.safe_load(Path("run/config.yaml").read_text())
    assert stored["checkpoint"] == "detr_small" and stored["model"]["queries"] == 5 and "cache_dir" not in stored
    assert configure("train", ["--config-dir", "run", "--config-name", "config"]) == config


def test_load_takes_a_name(server: FileServer) -> None:
    model, task = assembly.load("detr_small")
    (batch,) = task.read("photo.jpg")
    assert len(task.predict(model, batch)) == 1 and len(server.requests) == 1
    with pytest.raises(UserError, match="did you mean detr_large"):
        assembly.load("detr_larg")


def test_an_export_takes_a_name_and_names_the_folder_after_it(server: FileServer) -> None:
    config = configure("evaluate", ["checkpoint=detr_small"], assembly.stored_config)
    assert config["checkpoint"] == "detr_small" and assembly.restore(config).file is not None


def test_a_name_without_a_cache_folder_is_refused(server: FileServer, run: Run) -> None:
    assert "cache_dir has no value" in run(*PREDICT, "cache_dir=''", code=2)[1]
    run(*PREDICT, "cache_dir=elsewhere")
    assert Path("elsewhere/weights/detr_small/detr-small.pth").exists()


def test_all_files_of_a_name_come_into_one_folder(server: FileServer, tmp_path: Path) -> None:
    names = ("model.bin", "source.spm", "vocab.json")
    files = [{"address": f"{server.address}/{name}", "hash": None} for name in names]
    entry = {"publisher": "someone", "licence": "CC0", "files": files, "model": "transformer_opus", "constants": {}}
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump({"translator": entry}))
    server.files |= {"/model.bin": b"weights", "/source.spm": b"pieces"}
    config = {"checkpoint": "translator", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"vocab\.json could not be downloaded .*404"):
        fetching.locate(config)
    server.files["/vocab.json"] = b"{}"
    source = fetching.locate(config)
    assert source.path.name == "model.bin" and source.title.startswith("translator of someone (CC0), ")
    assert {file.name for file in source.path.parent.iterdir()} == {".lock", *names}
    assert [path for path, _ in server.requests] == ["/model.bin", "/source.spm", "/vocab.json", "/vocab.json"]


# The table.


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def folder() -> str:
        return str(configure("train", ["model=vit"])["cache_dir"])

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_CACHE_HOME", "TRIPTYCH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    assert folder() == f"{tmp_path}/.cache/triptych"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == "/x/triptych"
    monkeypatch.setenv("TRIPTYCH_CACHE", "/y")
    assert folder() == "/y"


ENTRIES: dict[str, Any] = yaml.safe_load(published.TABLE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ENTRIES)
def test_every_name_composes_and_all_its_constants_are_keys(name: str) -> None:
    entry = ENTRIES[name]
    config = configure("evaluate", [f"checkpoint={name}"], lambda file: {})
    flat = {key: value for section in ("model", "data") for key, value in flattened(config[section], section).items()}
    assert {key: flat[key] for key in entry["constants"]} == entry["constants"]
    assert {key: value for key, value in config.items() if key in ("checkpoint", "weights")}["checkpoint"] == name


def flattened(config: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix: config}
    return {key: value for name, part in config.items() for key, value in flattened(part, f"{prefix}.{name}").items()}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_hash_in_a_files_name_is_the_tables(name: str) -> None:
    for file in ENTRIES[name]["files"]:
        end = Path(file["address"]).stem.rpartition("-")[2]
        is_hash = len(end) == 8 and all(digit in "0123456789abcdef" for digit in end)
        assert file["hash"] == (end if is_hash else None)
        assert file["address"].startswith("https://")


def test_an_experiment_keeps_its_constants_and_a_line_names_the_difference(run: Run) -> None:
    line = ["experiment=vit_b16_finetune_384", "data.root=x", "--cfg", "job"]
    out, err = run("train", "checkpoint=vit_b16", *line)
    assert "was published with other values than the experiment has: data.mean=[0.485, 0.456, 0.406]" in err
    assert yaml.safe_load(out)["data"]["mean"] == [0.5, 0.5, 0.5]
    assert json.loads(json.dumps(yaml.safe_load(out)))["checkpoint"] == "vit_b16"


def test_a_sweep_over_names_gives_each_its_model() -> None:
    from common.config.compose import Command

    command = Command("train", ["-m", "checkpoint=deit_ti16,deit_s16"])
    command.prepare()
    widths = [command.compose([f"checkpoint={name}"]).config["model"]["width"] for name in ("deit_ti16", "deit_s16")]
    assert widths == [192, 384]
