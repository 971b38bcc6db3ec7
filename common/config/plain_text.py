"""Text that OmegaConf takes as it is: `${` in a path or a checkpoint's config is no interpolation."""

import re
from typing import Any

from omegaconf import OmegaConf


def as_plain_text(value: Any) -> Any:
    r"""Escape `${` in a text, or in all texts of a config, as `\${`; backslashes before it are doubled."""
    if isinstance(value, dict):
        return {key: as_plain_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain_text(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value) if isinstance(value, str) else value


def resolved_text(text: str) -> str:
    """The text that OmegaConf makes of an override's value."""
    return str(OmegaConf.create({"text": text}).text)


def config_yaml(config: dict[str, Any]) -> str:
    """Write a resolved config as YAML, which OmegaConf reads as the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(as_plain_text(config)))
