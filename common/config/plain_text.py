"""Escape `${` in paths and in configs of checkpoints, so that OmegaConf does not interpolate it."""

import re
from typing import Any

from omegaconf import OmegaConf


def as_plain_text(value: Any) -> Any:
    r"""Escape `${` in a text, or in all texts of a config, as `\${`. Backslashes directly before it are doubled.

    Other values are unchanged, except that a tuple becomes a list.
    """
    if isinstance(value, dict):
        return {key: as_plain_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain_text(item) for item in value]
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value) if isinstance(value, str) else value


def resolved_text(text: str) -> str:
    """Resolve the interpolations and escapes in the text of an override's value, as OmegaConf does."""
    return str(OmegaConf.create({"text": text}).text)


def config_yaml(config: dict[str, Any]) -> str:
    """Return a resolved config as YAML text, from which OmegaConf reads the same config."""
    return OmegaConf.to_yaml(OmegaConf.create(as_plain_text(config)))
