"""The doors as a user of the translator uses them: one small run on numbers, then all that can be done with it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch

Door = Callable[..., str]
ROOT = Path(__file__).parents[2]
ENGLISH = "zero one two three four five six seven eight nine".split()
GERMAN = "null eins zwei drei vier fünf sechs sieben acht neun".split()
SMALL = [
    *("model.width=32", "model.heads=2", "model.feedforward=48", "model.encoder_layers=1", "model.decoder_layers=2"),
    *("schedule.warmup=1", "trainer.log_every=2", "optimizer.lr=1e-2", "trainer.ema_decay=0.5"),
]
TOKENIZER = ["data.tokenizer.pieces=bytes", "data.tokenizer.vocabulary=275"]
DATA = [*TOKENIZER, "data.batch_size=700", "data.val_count=12", "data.test_count=20", "data.longest=60"]
RUN = ["model=seq2seq", "data=parallel_text", *SMALL, *DATA, "trainer.steps=40", "trainer.eval_every=20"]
RUN += ["trainer.micro_batch=300", "model.blocks.dropout=0.05", "task.predict.longest_extra=10"]
LINES = ["one two", "", "nine nine nine", "Größe, über 你好"]
pytestmark = pytest.mark.slow


def pairs(start: int, stop: int) -> str:
    """Lines of numbers of two to four digits, digit by digit: English, tab, German."""
    rows = [[int(c) for c in str(number)] for number in range(start, stop, 7)]
    return "".join(f"{' '.join(ENGLISH[d] for d in row)}\t{' '.join(GERMAN[d] for d in row)}\n" for row in rows)


def numbers_of(output: str) -> dict[str, float]:
    """The JSON line of evaluate.py."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))


def results_of(folder: Path) -> dict[str, float]:
    """The test scores of a finished run."""
    numbers = json.loads((folder / "results.json").read_text())
    return {name: value for name, value in numbers.items() if name.startswith("test/")}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def translate_pipe(text: str, *arguments: str, cwd: Path) -> str:
    """The standard output of predict.py, with this text as its standard input."""
    command = [sys.executable, str(ROOT / "predict.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, input=text.encode(), capture_output=True, cwd=cwd, env=environment)
    assert process.returncode == 0, process.stderr.decode()
    return process.stdout.decode()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a path that has a meaning in Hydra's grammar."""
    file = tmp_path_factory.mktemp("my texts (all), of=mine") / "pairs [en, de].tsv"
    file.write_text(pairs(10, 2800), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def trained(door: Door, tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, door("train", *RUN, f"data.train.pairs={text}", f"run_dir={folder}")


@pytest.fixture
def best(trained: tuple[Path, str]) -> str:
    return f"checkpoint={trained[0]}/checkpoints/best.pt"


# Training.


def test_a_run_prints_its_scores_and_writes_its_files(trained: tuple[Path, str]) -> None:
    folder, output = trained
    for text in (
        "test/bleu ",
        "test/chrf ",
        "test/exact_match ",
        "test/perplexity ",
        "275 entries for both",
        str(folder),
    ):
        assert text in output, text
    for name in ("config.yaml", "metrics.jsonl", "train.log", "results.json", "task.json", "checkpoints/best.pt"):
        assert (folder / name).exists(), name
    assert {"test/bleu", "test/exact_match", "test/loss"} <= results_of(folder).keys()
    keys = {key for line in metrics(folder) for key in line}
    assert {"train/loss", "train/nll", "train/lr", "val/bleu", "val/loss", "test/bleu"} <= keys
    losses = [line["train/nll"] for line in metrics(folder) if "train/nll" in line]
    assert losses[-1] < 0.7 * losses[0]
    files = [*(folder / "predictions").iterdir()]
    assert files and all(file.stat().st_size for file in files)
    assert "weights   initialised at random" in output and "Traceback" not in output


def test_the_same_command_gives_the_same_bytes(
    inside: Door, trained: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    """In another process, with workers: the tokenizer, the order and dropout are reproduced."""
    inside("train", *RUN, f"data.train.pairs={text}", f"run_dir={tmp_path / 'two'}", "trainer.workers=2")
    for name in ("metrics.jsonl", "task.json", "results.json"):
        assert (trained[0] / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(
    inside: Door, trained: tuple[Path, str], text: Path, tmp_path: Path
) -> None:
    command = [*RUN, f"data.train.pairs={text}", f"run_dir={tmp_path / 'two'}"]
    shutil.copytree(trained[0], tmp_path / "two")
    (tmp_path / "two/results.json").unlink()
    checkpoints = sorted((tmp_path / "two/checkpoints").glob("step_*.pt"))
    assert len(checkpoints) > 1
    checkpoints[-1].unlink()
    output = inside("train", *command, "resume=auto")
    assert "from the run's own last checkpoint" in output
    assert (trained[0] / "metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_two_processes_train_and_evaluate_to_the_same_numbers(
    door: Door, inside: Door, text: Path, tmp_path: Path
) -> None:
    """Without dropout, which depends on the rank."""
    command = [*RUN, f"data.train.pairs={text}", "trainer.steps=4", "trainer.eval_every=4", "model.blocks.dropout=0"]
    command.append("trainer.precision=fp32")  # bf16 sums in another order differ by 1%
    inside("train", *command, f"run_dir={tmp_path / '1'}")
    output = door("train", *command, "trainer.device=cpu", f"run_dir={tmp_path / '2'}", processes=2)
    assert "2 processes" in output
    for row, row_of_two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert row == pytest.approx(row_of_two, rel=1e-3, abs=1e-6)


# Evaluation.


def test_evaluation_gives_the_scores_of_training(
    inside: Door, trained: tuple[Path, str], best: str, tmp_path: Path
) -> None:
    folder, _ = trained
    output = inside("evaluate", best, "details=true", f"output={tmp_path / 'out'}")
    assert numbers_of(output) == results_of(folder)
    assert "tok:13a|smooth:exp" in output and "averaged (EMA)" in output
    with (tmp_path / "out/translations.tsv").open(encoding="utf-8", newline="") as file:
        rows = [*csv.DictReader(file, dialect="excel-tab")]
    bleu = sacrebleu.corpus_bleu([row["translation"] for row in rows], [[row["reference"] for row in rows]])
    assert len(rows) == 20 and bleu.score == pytest.approx(numbers_of(output)["test/bleu"], abs=1e-9)
    for file in (folder / "predictions").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    greedy = numbers_of(inside("evaluate", best, "task.predict.method=greedy", "split=val"))
    assert greedy.keys() == {key.replace("test/", "val/") for key in numbers_of(output)}


def test_an_evaluation_writes_its_results_though_nobody_reads_what_it_prints(best: str, tmp_path: Path) -> None:
    """As in `evaluate.py ... output=out | head -1`."""
    command = [sys.executable, str(ROOT / "evaluate.py"), best, f"output={tmp_path / 'out'}", "details=true"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:  # fmt: skip
        process.stdout.close()
        assert "Traceback" not in process.stderr.read().decode() and process.wait() == 0
    names = {"results.json", "translations.tsv", "scores.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_evaluating_the_references_gives_perfect_scores(inside: Door, best: str) -> None:
    numbers = numbers_of(inside("evaluate", best, "task.predict.method=given"))
    assert numbers["test/exact_match"] == 1 and numbers["test/bleu"] == pytest.approx(100)


# Prediction.


def test_a_file_and_a_pipe_are_translated_line_by_line(inside: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    lines = inside("predict", best, f"input={tmp_path / 'in.txt'}").split("\n")
    assert len(lines) == 5 and lines[1] == lines[4] == "" and all(lines[i] for i in (0, 2, 3))
    assert {*lines[0].split()} & {*GERMAN}
    assert translate_pipe("\n".join(LINES) + "\n", best, "input=-", cwd=tmp_path).split("\n") == lines
    assert translate_pipe("one two", best, "input=-", cwd=tmp_path) == lines[0] + "\n", "the last line may lack its end"
    assert not (tmp_path / "predictions").exists()


def test_a_line_is_translated_before_the_next_is_written(best: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "predict.py"), best, "input=-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:  # fmt: skip
        for line in (b"one two\n", b"\n", b"three\n"):
            process.stdin.write(line)
            process.stdin.flush()
            translation = process.stdout.readline()
            assert translation.endswith(b"\n") and bool(translation.strip()) == bool(line.strip())
        process.stdin.close()
        assert process.stdout.read() == b"" and process.wait() == 0


def test_candidates_have_line_number_and_score_and_the_best_is_first(inside: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one two\nthree\n")
    output = inside("predict", best, f"input={tmp_path / 'in.txt'}", "candidates=3")
    rows = [line.split("\t") for line in output.splitlines()]
    assert [row[0] for row in rows] == ["1"] * 3 + ["2"] * 3
    for candidates in (rows[:3], rows[3:]):
        scores = [float(row[1]) for row in candidates]
        assert scores == sorted(scores, reverse=True) and len({row[2] for row in candidates}) == 3
    best_translations = inside("predict", best, f"input={tmp_path / 'in.txt'}").splitlines()
    assert best_translations == [rows[0][2], rows[3][2]]


def test_given_pairs_are_scored(inside: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one two\teins zwei\none two\tneun fünf vier\n", encoding="utf-8")
    output = inside("predict", best, f"input={tmp_path / 'in.txt'}", "method=given", "penalty=none")
    rows = [line.split("\t") for line in output.splitlines()]
    assert [row[2] for row in rows] == ["eins zwei", "neun fünf vier"] and float(rows[0][1]) > float(rows[1][1])


def test_attention_is_drawn_into_the_output_folder(inside: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("one two\n\nthree\n")
    output = inside("predict", best, f"input={tmp_path / 'in.txt'}", "attention=true", f"output={tmp_path / 'a b'}")
    files = sorted((tmp_path / "a b").iterdir())
    assert [file.name for file in files] == ["000001.attention.svg", "000003.attention.svg"]
    assert all(file.read_text("utf-8").rstrip().endswith("</svg>") for file in files) and len(output.splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["input=nowhere.txt"], "nowhere.txt"),
        (["input=empty.txt"], "empty"),
        (["input=in.txt", "candidates=5"], "expected at most 4"),
        (["input=in.txt", "beem=3"], "did you mean"),
        (["input=in.txt", "beam=0"], "beam"),
    ],
)
def test_mistakes_end_in_one_sentence(
    inside: Door, best: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "in.txt").write_text("one two three\n")
    assert message in inside("predict", best, *arguments, code=2)


def test_lines_that_cannot_be_translated_are_listed_at_the_end(door: Door, best: str, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"one\ntw\xff\n" + b"nine " * 40 + b"\ntwo\n")
    output = door("predict", best, f"input={tmp_path / 'in.txt'}", "model.longest=100", code=1).splitlines()
    assert output[0] and output[1:3] == ["", ""] and output[3] and output[4].startswith("weights   ")
    assert [line.partition(":")[0] for line in output[5:]] == [f"Line {n} was not translated" for n in (2, 3)]


# Other vocabularies and data.


def test_languages_may_have_separate_vocabularies(inside: Door, text: Path, tmp_path: Path) -> None:
    keys = ["data.tokenizer.joint=false", "model.tied=target", "data.tokenizer.vocabulary=265", "trainer.steps=4"]
    output = inside("train", *RUN, *keys, f"data.train.pairs={text}", f"run_dir={tmp_path / 'run'}")
    assert "265 + 265 entries" in output
    file = f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}"
    assert numbers_of(inside("evaluate", file)) == results_of(tmp_path / "run")
    (tmp_path / "in.txt").write_text("one two\n")
    assert len(inside("predict", file, f"input={tmp_path / 'in.txt'}").splitlines()) == 1


def test_fine_tuning_keeps_its_checkpoints_tokenizers_or_re_initialises_embeddings(
    inside: Door, trained: tuple[Path, str], best: str, tmp_path: Path
) -> None:
    (tmp_path / "other.tsv").write_text(pairs(3000, 6000), encoding="utf-8")
    command = [
        *RUN,
        f"data.train.pairs={tmp_path / 'other.tsv'}",
        "data.tokenizer.vocabulary=264",
        "trainer.steps=2",
        best,
    ]
    output = inside("train", *command, f"run_dir={tmp_path / 'inherited'}")
    assert "275 entries for both" in output and "re-initialised" not in output
    assert (tmp_path / "inherited/task.json").read_bytes() == (trained[0] / "task.json").read_bytes()
    output = inside("train", *command, "task.keep_tokenizers=false", f"run_dir={tmp_path / 'new'}")
    assert "264 entries for both" in output and "; re-initialised: embedding.weight" in output
    content = torch.load(tmp_path / "new/checkpoints/best.pt", weights_only=True)
    assert content["model"]["embedding.weight"].shape == (264, 32)


def test_translating_does_not_need_the_training_file(inside: Door, best: str, tmp_path: Path) -> None:
    """Evaluating needs the test file, by its new path."""
    (tmp_path / "in.txt").write_text("one two\n")
    missing = ["data.train.pairs=nowhere.tsv"]
    assert inside("predict", best, f"input={tmp_path / 'in.txt'}", *missing).strip()
    assert "nowhere.tsv" in inside("evaluate", best, *missing, code=2)
    (tmp_path / "test.tsv").write_text(pairs(4000, 4100), encoding="utf-8")
    assert "test/bleu" in inside(
        "evaluate", best, *missing, f"data.test.pairs={tmp_path / 'test.tsv'}", "data.val_count=0"
    )


def test_a_folder_of_text_trains_by_data_root_alone(inside: Door, tmp_path: Path) -> None:
    """A file of pairs with fewer than the 1,000 that a large file gives to val and test."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/train.tsv").write_text(pairs(20, 720), encoding="utf-8")
    line = ["model=seq2seq", "data=parallel_text", *SMALL, *TOKENIZER, f"data.root={tmp_path / 'text'}"]
    line += ["trainer.steps=2", "task.predict.longest_extra=5"]
    output = inside("train", *line, f"run_dir={tmp_path / 'run'}")
    assert f"data      data.root={tmp_path / 'text'}: train.tsv is train\n" in output
    for split, count in (("train", 80), ("val", 10), ("test", 10)):
        assert f"data      {split}: {count} pairs, " in output
    numbers = numbers_of(inside("evaluate", f"checkpoint={tmp_path / 'run/checkpoints/best.pt'}"))
    assert numbers["test/bleu"] == results_of(tmp_path / "run")["test/bleu"]


def test_files_and_folders_with_names_that_are_not_utf8_are_read_and_written(
    command: Door, door: Door, tmp_path: Path
) -> None:
    """In a process that Python starts, it decodes the arguments; the others get them decoded."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file, run = folder / os.fsdecode(b"paires \xe9.tsv"), folder / "run"
    file.write_text(pairs(10, 2800), encoding="utf-8")
    output = command("train", *RUN, f"data.train.pairs={file}", "trainer.steps=2", f"run_dir={run}")
    assert "caf\\udce9" in output and "test/bleu" in results_of(run)
    best, out = f"checkpoint={run}/checkpoints/best.pt", folder / "out"
    assert numbers_of(door("evaluate", best, f"output={out}")) == results_of(run)
    source = folder / os.fsdecode(b"\xe9.txt")
    source.write_text("one two\n")
    lines = [f"input={source}", "attention=true", f"output={out}"]
    assert door("predict", best, *lines).splitlines()[0] and (out / "000001.attention.svg").is_file()
    assert "no file" in door("predict", best, f"input={folder / 'missing'}", code=2)


def test_the_default_data_need_no_network(inside: Door, tmp_path: Path) -> None:
    """A shorter run on fewer phrases of CLDR."""
    keys = ["data.train_count=3000", "data.val_count=40", "data.test_count=60", "data.tokenizer.vocabulary=700"]
    output = inside("train", "model=seq2seq", *keys, *SMALL, "trainer.steps=3", f"run_dir={tmp_path / 'run'}")
    assert "en -> de" in output and "test/exact_match " in output
    assert "test/bleu" in results_of(tmp_path / "run")
