"""Which choice of a group has a key that the present choice lacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from common.config.diff import flatten
from common.config.schema import WINGS


def choices_with(key: str, config: dict[str, Any], files: Sequence[Path]) -> list[str]:
    """Which choices of the key's group have the key, and a class of the same wing as the section in `config`.

    `files` are the yaml files of the group's choices; returns the names of those that fit.
    """
    group, _, name = key.partition(".")
    wing = _wing(config.get(group))
    sections = {file.stem: OmegaConf.to_container(OmegaConf.load(file)) for file in files} if wing in WINGS else {}
    return [choice for choice, section in sections.items() if _wing(section) == wing and name in flatten(section)]


def _wing(section: Any) -> str:
    return str(section.get("_target_")).partition(".")[0] if isinstance(section, dict) else ""
