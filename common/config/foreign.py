"""Prevent config files and folders of another person from executing code through Hydra.

Hydra loads plugins from installed packages only. Hydra's settings and the packages to trust are taken only from the
command line.
"""

import site
import sys
import sysconfig
from collections.abc import Collection
from copy import copy
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf

from common.config.migrations import migrate_config
from common.config.yaml_files import read_yaml
from common.errors import UserError

# Keys that protect the user, and their defaults. They are read only from the command line, never from a config file.
TYPED_KEYS: dict[str, Any] = {"trust": [], "check_memory": True}
# Keys of the sections `hydra` and `hydra.job` in which Hydra records the command line and the folder of --config-dir.
_RECORDED = ("overrides", "runtime", "searchpath", "mode")
_RECORDED_OF_JOB = ("name", "config_name", "override_dirname")


def load_installed_plugins() -> None:
    """Let Hydra load its plugins from installed packages only; further calls do nothing.

    By default, Hydra would execute all modules of the packages named `hydra_plugins` in all folders of sys.path, such
    as the working folder.
    """
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *site.getsitepackages()]
    installed = [Path(folder).resolve() for folder in [*folders, site.getusersitepackages()]]
    search_path = sys.path[:]
    try:
        sys.path[:] = [
            folder for folder in search_path if any(Path(folder).resolve().is_relative_to(top) for top in installed)
        ]
        Plugins.instance()
    finally:
        sys.path[:] = search_path


def whole_config(file: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Read the file of a whole config (--config-name), such as a run's config.yaml.

    Returns two items: the config that Hydra is to use instead of the file, or None if Hydra can use the file as it is;
    and a list of notices. The section `hydra` is ignored, with a notice. A config that a run of an earlier version
    wrote is migrated. A file with a defaults list was written by a user, and is not migrated. Raises UserError if the
    file cannot be read or holds no config.
    """
    content = read_yaml(file, "correct it")
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no config; write keys and values, such as seed: 1.")
    config = {str(key): value for key, value in content.items() if key != "hydra"}
    config = config if "defaults" in config else migrate_config(config)
    notice = f"{file}: its section hydra is ignored; Hydra's settings are given on the command line, with -m."
    return (None if config == content else config), [notice] * ("hydra" in content)


def hydra_settings(composed: DictConfig) -> dict[str, Any]:
    """Return Hydra's own section of a composed config, without the keys in which Hydra records the command line."""
    section = OmegaConf.to_container(OmegaConf.masked_copy(composed, ["hydra"]))
    assert isinstance(section, dict)
    job = {key: value for key, value in section["hydra"]["job"].items() if key not in _RECORDED_OF_JOB}
    return {key: value for key, value in section["hydra"].items() if key not in _RECORDED} | {"job": job}


def typed_only(config: dict[str, Any], typed: Collection[str]) -> list[str]:
    """Set each key of TYPED_KEYS that is not on the command line to its default, in place.

    `typed` are the keys on the command line. The replaced values come from config files. Returns a notice for each
    replaced value that is neither null nor the default.
    """
    notices = []
    for key, default in TYPED_KEYS.items():
        if key in typed:
            continue
        if config.get(key, default) not in (default, None):
            notices.append(
                f"{key}={config[key]} in a config file is ignored; give {key}= on the command line if you mean it."
            )
        config[key] = copy(default)
    return notices
