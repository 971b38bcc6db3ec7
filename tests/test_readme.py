"""What the README, the pages of the folders and CONTRIBUTING state in commands, links, keys and numbers is true."""

import re
from pathlib import Path

import pytest

from common.config.compose import configure

ROOT = Path(__file__).parents[1]
PAGES = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        *(f"{folder}/README.md" for folder in ("common", "detr", "vit", "seq2seq", "scripts")),
        "CONTRIBUTING.md",
    )
}
README, COMMON = PAGES["README.md"], PAGES["common/README.md"]
RESULTS = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
SET_UP = "python3 -m venv .venv && .venv/bin/pip install -q -c constraints.txt -e "
FIGURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
NUMBER = re.compile(r"(?<![\w.-])\d+\.\d+(?![\w.])")


def commands(page: str) -> list[str]:
    """The indented lines of a page, continued lines joined."""
    return [line.strip() for line in page.replace("\\\n", " ").splitlines() if line.startswith("    ")]


def keys(config: dict, prefix: str = "") -> set[str]:
    """All keys of a config, those of sections as well, with dots."""
    names = {f"{prefix}{name}" for name in config}
    return names.union(*(keys(part, f"{prefix}{name}.") for name, part in config.items() if isinstance(part, dict)))


ALL_COMMANDS = {line for page in PAGES.values() for line in commands(page)}
TRAINING = sorted(line for line in ALL_COMMANDS if re.search(r"train\.py .*model=", line))


def test_the_readme_opens_with_two_commands_that_do_all_the_set_up():
    first, second = [line for line in commands(README) if line.startswith("python3 -m venv")]
    assert first == SET_UP + ". && .venv/bin/python train.py model=detr"
    assert second.startswith(SET_UP) and second.endswith('-m pytest -q -m "not slow"')
    assert commands(README)[:2] == [first, second]


def test_ci_runs_the_very_test_command_of_the_readme():
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert commands(README)[1] in script


def test_pages_are_short():
    assert len(README.splitlines()) <= 150
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 150


def test_the_readme_has_one_figure_of_less_than_300_kB():
    (figure,) = FIGURE.findall(README)
    assert 0 < (ROOT / figure).stat().st_size < 300_000


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_compose(line):
    arguments = line.partition("train.py ")[2].partition(" #")[0].split()
    arguments = [re.sub(r"^(model=\w+),.*", r"\1", word) for word in arguments]  # the first of several models
    # a sweep's choices, a user's own package and a stored config are not in this repository
    arguments = [word for word in arguments if not re.search(r"=[^\[]*,|^-m$|^sweep_dir=", word)]
    if "--config-dir" not in arguments:
        assert configure("train", arguments)["model"]["_target_"]


@pytest.mark.parametrize("name", PAGES)
def test_links_and_configs_that_a_page_names_exist(name):
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", PAGES[name]):
        target = (ROOT / name).parent / link if link else ROOT / name
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], anchor
    for group in ("model", "experiment", "data"):
        for choice in re.findall(rf"(?<![\w.]){group}=(\w+)", PAGES[name].replace(f"{group}=mine", "")):
            if choice.isupper():  # a placeholder
                continue
            assert (ROOT / f"configs/{group}/{choice}.yaml").exists(), f"{group}={choice}"


def test_keys_that_a_page_names_exist():
    choices = [("detr_r50", "shapes"), ("detr", "coco"), ("vit", "digits"), ("vit", "imagefolder"), ("seq2seq", "cldr")]
    choices += [("igpt", "fashion_mnist"), ("gpt_translator", "cldr"), ("gpt2", "text")]
    choices += [("bert", "sentences"), ("bert_classifier", "text_classes")]
    choices += [("rnn_luong", "cldr")]
    choices += [("word2vec", "word_pairs")]
    choices += [("vit", "cifar10"), ("seq2seq", "parallel_text"), ("detr", "voc"), ("detr", "csv"), ("dino", "coco")]
    choices += [("deformable_detr", "coco"), ("faster_rcnn", "shapes"), ("promptable", "nested_shapes")]
    choices += [("lstr", "tusimple"), ("tnt", "digits"), ("cnn", "digits"), ("swin", "digits"), ("mae", "digits")]
    known = set().union(*(keys(configure("train", [f"model={model}", f"data={data}"])) for model, data in choices))
    known.add("model.compressed")  # of compressed models only
    key = re.compile(r"(?<![\w./])((?:data|model|task|trainer|optimizer|schedule)(?:\.[a-z_0-9]+)+)(?==|`)")
    named = {name for page in PAGES.values() for name in key.findall(page)}
    files = (".py", ".json", ".yaml", ".pt2", ".onnx", ".xml", ".bin")
    named = {name for name in named if not name.endswith(files)}
    assert len(named) > 20
    assert not named - known


@pytest.mark.parametrize("name", PAGES)
def test_scripts_and_their_options_that_a_page_names_exist(name):
    for line in commands(PAGES[name]):
        for script, arguments in re.findall(r"(?<!/)scripts/(\w+\.py)([^&|]*)", line.partition(" #")[0]):
            source = (ROOT / "scripts" / script).read_text(encoding="utf-8")
            for option in re.findall(r" (--[a-z-]+)", arguments):
                assert option in source, f"{script} {option}"


def test_numbers_of_the_readme_stand_in_results():
    table = README.partition("## Results")[2].partition("\n## ")[0]
    cells = [cell for line in table.splitlines() if line.startswith("| ") for cell in line.split("|")[2:4]]
    printed = [line.partition(" # ")[2] for line in commands(README) if line.startswith("python train.py model=")]
    numbers = [number for text in (*cells, *printed) for number in NUMBER.findall(text)]
    assert len(numbers) > 12
    assert not set(numbers) - set(NUMBER.findall(RESULTS))


def test_every_row_of_the_faults_names_tests_that_exist():
    """A file is named by the end of its path, which must fit one file only; parts after "`file`:" are of its tests."""
    section = COMMON.partition("## Faults and what happens")[2].partition("\n## ")[0]
    header = re.compile(r"\| (fault|input|---) ")
    lines = [line for line in section.splitlines() if line.startswith("| ") and not header.match(line)]
    rows = [line.split("|")[3] for line in lines]
    folder = ROOT / "tests"
    names_by_file = {
        f"/{path.relative_to(folder).as_posix()}": re.findall(r"def (test_\w+)", path.read_text(encoding="utf-8"))
        for path in folder.rglob("test_*.py")
    }
    assert len(rows) > 20
    for row in rows:
        names = [name for names in names_by_file.values() for name in names]
        words = re.findall(r"`([^`]+)`(:?)", row)
        assert words
        for word, colon in words:
            files = [file for file in names_by_file if file.endswith(f"/{word}")]
            if word.endswith(".py"):
                assert len(files) == 1, f"{word} is the end of {len(files)} files' paths"
                names = names_by_file[files[0]] if colon else names
            else:
                assert any(word in name for name in names), word
