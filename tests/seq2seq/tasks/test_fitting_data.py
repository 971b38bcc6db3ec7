"""Each task accepts the data of its own kind, and refuses those of the other tasks in a sentence, before any work."""

import re
from typing import Any

import pytest

from common.config import compose
from common.config.check import build
from common.config.compose import configure
from common.errors import UserError

DATA_OF_MODELS = {  # one model of each task, and the data that fit it
    "seq2seq": {"multi30k", "cldr", "parallel_text"},
    "gpt": {"text", "text_gpt2"},
    "bert": {"sentences", "sentences_512"},
    "bert_classifier": {"text_classes"},
    "word2vec": {"word_pairs"},
}
DATA = sorted(set().union(*DATA_OF_MODELS.values()))


def sections(model: str, data: str) -> dict[str, Any]:
    """The checked config of a model and data, which needs no file."""
    longest = ["model.longest=8"] * (model == "gpt")  # refers to data.block in the yaml file
    return configure("train", [f"model={model}", f"data={data}", *longest])


def targets(group: str, package: str) -> dict[str, str]:
    """The classes of a package that the files of a config group name, by the name of the file."""
    files = {name: (compose.CONFIGS / group / f"{name}.yaml").read_text() for name in compose.choices_of(group)}
    matches = {name: re.search(rf"_target_: ({package}\.\S+)", text) for name, text in files.items()}
    return {name: match[1] for name, match in matches.items() if match}


def test_the_table_lists_all_data_sets_and_tasks() -> None:
    tasks = targets("model", "seq2seq.tasks")
    assert targets("data", "seq2seq.data").keys() == {*DATA}
    assert {tasks[model] for model in DATA_OF_MODELS} == {*tasks.values()}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("model", DATA_OF_MODELS)
def test_a_task_accepts_its_own_data_only_and_names_them_otherwise(model: str, data: str) -> None:
    config = sections(model, data)
    content = build(config["data"])
    if data in DATA_OF_MODELS[model]:
        assert build(config["task"], data=content).data is content
        return
    with pytest.raises(UserError) as error:
        build(config["task"], data=content)
    message = str(error.value)
    assert message.startswith(f"data._target_={type(content).__name__} has no ")
    assert {*re.findall(r"data=(\w+)", message)} == DATA_OF_MODELS[model]


@pytest.mark.parametrize("model", DATA_OF_MODELS)
def test_a_task_is_built_without_data(model: str) -> None:
    assert build(sections(model, "text")["task"], data=None).data is None
