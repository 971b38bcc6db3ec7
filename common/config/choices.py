"""Find the choices of a config group that have a key which the present choice lacks.

A choice of a group is one of its yaml files, such as configs/model/vit.yaml.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.config.diff import flatten
from common.config.schema import WINGS


def choices_with(key: str, config: dict[str, Any], files: Sequence[Path]) -> list[str]:
    """Return the choices of a key's group that have this key and name a class of the same wing as the present choice.

    The group is the first part of the full `key`. `config` holds the section of the present choice. `files` are the
    yaml files of the group's choices; a choice has the name of its file. The list is empty if the class of the present
    choice belongs to no wing.
    """
    group, _, name = key.partition(".")
    wing = _wing(config.get(group))
    sections = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files} if wing in WINGS else {}
    return [choice for choice, section in sections.items() if _wing(section) == wing and name in flatten(section)]


def _wing(section: Any) -> str:
    return str(section.get("_target_")).partition(".")[0] if isinstance(section, dict) else ""
