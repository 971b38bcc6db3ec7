"""Configs that earlier versions wrote, brought to the keys of today."""

from typing import Any


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the keys that came later, at the value that means what was done before."""
    return config
