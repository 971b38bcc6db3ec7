"""The checkpoint that holds weights of another program."""

from typing import Any

from common.train.assembly import Components

SECTIONS = ("model", "data", "task", "optimizer", "schedule", "trainer")  # of a stored config


def content(parts: Components, config: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint of step 0, with the weights and the task's state of a restored model.

    `config` is that of evaluate.py, from which `parts` were restored; its sections are stored.
    """
    return {
        "step": 0,
        "best": None,
        "model": {name: tensor.cpu() for name, tensor in parts.model.state_dict().items()},
        "average": None,
        "task": parts.task.state(),
        "config": {"seed": 0, **{name: config[name] for name in SECTIONS if name in config}},
    }
