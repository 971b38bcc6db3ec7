"""Compose a config from a command line in Hydra's grammar.

Unlike in Hydra, paths need no quotes, and each error is reported in one sentence.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from common.config import published, yaml_files
from common.config.check import DOOR_KEYS, TARGET_SECTIONS, build, check, did_you_mean
from common.config.choices import choices_with
from common.config.describe import shorten
from common.config.diff import flatten
from common.config.flags import parse_flags
from common.config.foreign import hydra_settings, load_installed_plugins, typed_only, whole_config
from common.config.migrations import update_names
from common.config.paths import expand_paths, in_quotes, quote_path
from common.config.plain_text import as_plain_text, resolved_text
from common.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GROUPS = ("model", "data", "optimizer", "schedule", "trainer", "experiment")
# Keys without effect in the other doors.
TRAINING_ONLY = {"trainer.eval_samples", "trainer.patience", "trainer.sparsity", "trainer.log"}
NUMBERS = r"[-+.\deE]+(,[-+.\deE]+)+"  # two or more numbers, without spaces
# Hydra 1.4 deprecates `version_base`, and its ConfigStore replaces a stored config only with `replace=True`. Hydra 1.3
# always replaces it.
_HYDRA_1_3 = hydra.__version__.startswith("1.3.")
_VERSION: dict[str, Any] = {"version_base": "1.3"} if _HYDRA_1_3 else {}
_REPLACE: dict[str, Any] = {} if _HYDRA_1_3 else {"replace": True}

ConfigReader = Callable[[Path], dict[str, Any]]  # reads a checkpoint's config; {} if it has none


class Composed(NamedTuple):
    """The config that a command line describes, and what the user should know about it."""

    config: dict[str, Any]  # in plain types
    choices: dict[str, str]  # group -> the name of its choice
    notices: list[str]  # sentences on updated names and on parts that are ignored
    settings: dict[str, Any]  # Hydra's own settings, as `foreign.hydra_settings` returns them


def configure(door: str, arguments: Sequence[str], base: ConfigReader | None = None) -> dict[str, Any]:
    """Compose the config of a command line, check it and return it; for use from Python.

    Raises UserError for a mistake in the command line or in the config.
    """
    command = Command(door, arguments, base)
    command.prepare()
    return command.checked().config


class Command:
    """The command line of a door (train, evaluate or predict): flags, and overrides in the form that Hydra reads."""

    def __init__(self, door: str, arguments: Sequence[str], base: ConfigReader | None = None, sweep: bool = False):
        """Parse the flags, and quote the paths in the overrides.

        In a sweep (`sweep`, or -m among the `arguments`), a comma separates the values of a key, even if they are
        paths. `base` reads the config of the file in checkpoint=; None for train.py.
        """
        self.door, self.base, self.arguments = door, base, arguments
        self.flags = parse_flags(arguments)
        self.config_name, self.folder = self.flags.config_name or door, CONFIGS
        self.config_file = f"{self.config_name}.yaml"  # as the user knows it; `_add_folder` may change config_name
        sweep = sweep or self.flags.multirun
        self.overrides = [quote_path(self._full(argument), sweep) for argument in self.flags.overrides]
        self.keys = {_key(argument) for argument in self.overrides}
        self.notices: list[str] = []  # on parts of --config-name's file that are ignored
        self.working_folder = os.getcwd() if "trust" in self.keys else None  # packages in trust= are imported from it

    def prepare(self) -> None:
        """Register the configs in --config-dir and in the checkpoint with Hydra.

        Raises UserError for keys that exclude each other, for a key that has no effect in this door, for a --config-dir
        or checkpoint that does not exist, and if nothing chooses a model.
        """
        if {"model", "experiment"} <= self.keys:
            raise UserError("experiment= already chooses the model; give either experiment= or model=.")
        hydra_key = next((key for key in self.keys if key.startswith(("hydra.", "hydra/"))), None)
        if hydra_key and not self.flags.multirun:
            raise UserError(
                f"{hydra_key}: Hydra's settings apply to sweeps (-m) only; the folder of a run is chosen by run_dir=."
            )
        if "sweep_dir" in self.keys and not self.flags.multirun:
            raise UserError("sweep_dir= is the folder of a sweep, which needs -m; a run's folder is run_dir=.")
        if "seed" in self.keys and self.door != "train":
            raise UserError(
                f"seed= is the seed of training, and without effect in {self.door}.py; what prediction samples depends "
                "on task.predict.seed=."
            )
        if self.door != "train" and (keys := sorted(TRAINING_ONLY & self.keys)):
            raise UserError(f"{keys[0]}= is for training, and without effect in {self.door}.py; leave it out.")
        if self.working_folder and self.working_folder not in sys.path:
            sys.path.append(self.working_folder)
        self._add_folder(self.flags.config_dir)
        stored = self._store_base()
        is_named = any(map(published.find, self._checkpoints(self.overrides)))
        if not (stored or is_named or self.flags.config_name or {"model", "experiment"} & self.keys):
            reason = "the checkpoint does not say which" if self.base else "see --help"
            raise UserError(f"{self.door}.py needs model=NAME ({reason}); there are {', '.join(choices_of('model'))}.")
        self.overrides = stored + self.overrides

    def compose(self, overrides: list[str] | None = None) -> Composed:
        """Compose the config of `overrides`, by default those of the command line, without checking it.

        Raises UserError if Hydra cannot compose it, or if an override has several values.
        """
        overrides = self.overrides if overrides is None else overrides
        for part in self.parse(overrides):
            _refuse_several(part)
        overrides, notices = self._with_published(overrides)
        notices = self.notices + notices
        try:
            with self.initialised():
                composed = hydra.compose(self.config_name, overrides, return_hydra_config=True)
                choices = {key: value for key, value in composed.hydra.runtime.choices.items() if value}
                config = plain_config(composed)
                notices += [*self._replace_length(config), *typed_only(config, {*map(_key, overrides)})]
                return Composed(config, choices, notices + update_names(config), hydra_settings(composed))
        except (HydraException, *yaml_files.ERRORS) as error:
            raise UserError(self._sentence(error, overrides)) from error

    def checked(self) -> Composed:
        """Compose the config of the command line and check it; raises UserError for a mistake.

        The config of a checkpoint contains `data.root`, but on this machine the data may be missing in this folder. If
        the data set would then generate synthetic data or download data there, `data.root` is replaced by a folder
        under data/.
        """
        composed = self.compose()
        check(composed.config, composed.config.get("trust") or [], self.door)
        return composed._replace(notices=[*composed.notices, *self._redirect_data(composed.config["data"])])

    def _redirect_data(self, section: dict[str, Any]) -> list[str]:
        """Replace the data section's `root`, in place, if a checkpoint set it and the data set would write files there.

        Returns a list with one notice, or an empty list if nothing is replaced.
        """
        if "data=checkpoint" not in self.overrides or "data.root" in self.keys:
            return []
        data = build(section)
        has_files = getattr(data, "root_has_files", None)
        if has_files is None or has_files():
            return []
        root = Path(section["root"])
        section["root"] = str(Path("data", root.name if root.name != ".." else "checkpoint"))
        notice = f"data.root={root} of the checkpoint lacks the data, which are written to {section['root']}"
        return [] if section["root"] == str(root) else [f"{notice}; data.root=FOLDER names another folder."]

    def _replace_length(self, config: dict[str, Any]) -> list[str]:
        """Reset trainer.epochs to None if the command line sets only trainer.steps, and vice versa.

        A yaml file may set the other key, and only one of them may have a value. `config` is changed in place. Returns
        a list with one notice, or an empty list if nothing is reset.
        """
        trainer = config.get("trainer")
        for key, replaced in (("steps", "epochs"), ("epochs", "steps")):
            typed = f"trainer.{key}" in self.keys and f"trainer.{replaced}" not in self.keys
            if isinstance(trainer, dict) and typed and None not in (trainer.get(key), trainer.get(replaced)):
                former, trainer[replaced] = trainer[replaced], None
                return [f"trainer.{key}={trainer[key]} replaces trainer.{replaced}={former}."]
        return []

    @contextmanager
    def initialised(self) -> Iterator[None]:
        """Create a context in which Hydra reads configs from `self.folder`.

        Hydra itself refuses such a context inside another one, which occurs if a run of a sweep loads a teacher.
        """
        load_installed_plugins()
        outer = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()
        try:
            with hydra.initialize_config_dir(config_dir=str(self.folder), job_name=self.door, **_VERSION):
                yield
        finally:
            GlobalHydra.instance().hydra = outer

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse the overrides by Hydra's grammar; raises UserError for an override that does not follow it.

        The parser needs Hydra's config loader, because glob() in an override stands for choices of a group.
        """
        try:
            with self.initialised():
                loader = GlobalHydra.instance().config_loader()
                return OverridesParser.create(loader).parse_overrides(list(overrides))
        except OverrideParseException as error:
            remedy = "write key=value, with special characters in two pairs of quotes: key=\"'a (b)'\""
            raise UserError(f"{shorten(str(error.override))}: not understood; {remedy}.") from error
        except (ValueError, RecursionError) as error:
            longest = max(overrides, key=len)
            raise UserError(f"{shorten(longest)}: not understood; it has too many digits or brackets.") from error

    def _full(self, argument: str) -> str:
        """Expand the short name of an option of predict.py: threshold=0.5 becomes task.predict.threshold=0.5.

        Several numbers, as in points=10,20, become a list.
        """
        key, _, value = argument.partition("=")
        short = (
            self.door == "predict"
            and key.isidentifier()
            and key not in (*DOOR_KEYS["predict"], *TARGET_SECTIONS, *GROUPS)
        )
        if short and re.fullmatch(NUMBERS, value):
            argument = f"{key}=[{value}]"
        return f"task.predict.{argument}" if short else argument

    def _add_folder(self, extra: str | None) -> None:
        """Let Hydra also read the configs in the folder `extra` (--config-dir); does nothing if it is None.

        The folder holds further choices of groups. It may also hold the whole config that --config-name names, such as
        a run's config.yaml.
        """
        if not extra:
            return
        folder = Path(extra).expanduser().absolute()
        if not folder.is_dir():
            raise UserError(f"--config-dir {extra}: there is no such folder.")
        if (folder / "hydra").exists():  # Hydra would take its own settings from there, such as hydra/launcher/basic
            raise UserError(
                f"--config-dir {extra}: its folder hydra would change Hydra's settings, which come from the command "
                "line alone; remove it, or name another folder."
            )
        if (folder / f"{self.config_name}.yaml").is_file():
            self.folder, folder = folder, self.folder  # Hydra finds the primary config only in its main folder
            config, self.notices = whole_config(self.folder / f"{self.config_name}.yaml")
            if config is not None:
                self.config_name += "_migrated"
                ConfigStore.instance().store(self.config_name, config, **_REPLACE)
        # Hydra does not interpolate this key, so `${` in the path is not escaped.
        self.overrides.append(f"hydra.searchpath=[{in_quotes(f'file://{folder}')}]")

    def _store_base(self) -> list[str]:
        """Register the config in checkpoint=FILE as the choice "checkpoint" of each group except `experiment`.

        Returns the overrides that select this choice in all groups that the command line does not set. The command
        line's own overrides come after these, so they change the checkpoint's config. The list is empty for train.py
        and for a checkpoint without a config.
        """
        if self.base is None:
            return []
        paths = self._checkpoints(self.overrides)
        if not paths:
            raise UserError(f"{self.door}.py needs checkpoint=FILE; see --help.")
        if published.find(paths[-1]):  # files of other programs have no config
            return []
        file = Path(paths[-1]).expanduser()
        if not file.is_file():
            raise UserError(f"checkpoint={paths[-1]}: there is no such file.")
        config = self.base(file)
        if not config:
            return []
        sections = {"model": ("seed", "model", "task"), **{name: (name,) for name in GROUPS[1:-1]}}
        for group, names in sections.items():
            node = as_plain_text({name: config.get(name) for name in names})
            ConfigStore.instance().store("checkpoint", node, group=group, package="_global_", **_REPLACE)
        return [f"{group}=checkpoint" for group in sections if group not in self.keys]

    def _checkpoints(self, overrides: list[str]) -> list[str]:
        """Return the values of checkpoint= among the overrides. A sweep may give several; all are returned."""
        values = [part.value() for part in self.parse(overrides) if part.key_or_group == "checkpoint"]
        flat = [item for value in values for item in (value.list if isinstance(value, ChoiceSweep) else [value])]
        return [resolved_text(str(getattr(item, "text", item))) for item in flat if item is not None]

    def _with_published(self, overrides: list[str]) -> tuple[list[str], list[str]]:
        """Add the overrides that published weights imply, if checkpoint= names such weights.

        Returns all overrides, with the implied ones first, and a list of notices. With --config-name, published weights
        imply no overrides.
        """
        paths, keys = self._checkpoints(overrides), set(map(_key, overrides))
        weights = published.find(paths[-1]) if paths else None
        if weights is None or self.flags.config_name:
            return overrides, [line for path in paths[-1:] if (line := published.hidden_by_a_path(path))]
        others = [text for text in overrides if _key(text) != "checkpoint"]
        added, notices = published.implied(weights, keys, lambda chosen: flatten(self.compose(chosen + others).config))
        return added + overrides, notices

    def _sentence(self, error: Exception, overrides: list[str]) -> str:
        """Describe Hydra's error in one sentence, which suggests the closest valid word for a misspelt one."""
        if yaml_files.is_about_text(error):
            return f"a file of --config-dir {self.flags.config_dir} cannot be read ({yaml_files.describe(error)})."
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, name = error.missing_cfg_file.rpartition("/")
            reason = f"{group}={name}: there is no configs/{group}/{name}.yaml" if group else f"there is no {name}.yaml"
            return reason + did_you_mean(name, error.options or [])
        absent = re.search(r"'([^']+)' not found", str(error))
        if isinstance(error, InterpolationKeyError) and absent:
            group = absent[1].partition(".")[0]
            choice = f", or another {group}=" if group in GROUPS else ""
            reason = f"{error.full_key} refers to the key {absent[1]}, which this config lacks"
            return f"{reason}; give {error.full_key}= a value{choice}."
        lines = [line.strip() for line in f"{error}\n{error.__cause__ or ''}".splitlines() if line.strip()]
        key = next(iter(re.findall(r"Could not override '([^']+)'", lines[0])), None)
        if key in GROUPS:
            return f"{key}= cannot be chosen here: {self.config_file} is a whole config; set its keys one by one."
        groups = [override for override in overrides if _key(override) in (*GROUPS, "hydra.searchpath")]
        if key is None or len(groups) == len(overrides):
            return f"{lines[0].rstrip('.')}."
        composed = self.compose(groups)
        group = key.partition(".")[0]
        files = sorted((CONFIGS / group).glob("*.yaml")) if group in GROUPS else []
        if owners := choices_with(key, composed.config, files):
            choices = " or ".join(f"{group}={name}" for name in owners)
            return f"{key} is not a key of {group}={composed.choices.get(group)}; it is one with {choices}."
        known = [*flatten(composed.config), *GROUPS]
        if self.door == "predict":
            known += [name.rpartition(".")[2] for name in known if name.startswith("task.predict.")]
            key = key.removeprefix("task.predict.")
        return f"{key} is not a key of this config" + did_you_mean(key, known)


def plain_config(composed: DictConfig) -> dict[str, Any]:
    """Convert a composed config to plain types, without Hydra's section.

    Interpolations are resolved, and `~` in paths is expanded.
    """
    own = OmegaConf.masked_copy(composed, [str(name) for name in composed if name != "hydra"])
    config = expand_paths(OmegaConf.to_container(own, resolve=True))
    assert isinstance(config, dict)
    return config


def choices_of(group: str) -> list[str]:
    """Return the names of the choices in a group, which are the names of its yaml files without .yaml."""
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def _refuse_several(part: Override) -> None:
    """Raise UserError for an override with several values, and for a group with a value of a wrong type.

    The value of a group may be a name, which selects a choice, or a dict, which sets keys. A deletion (~group) may have
    no value, and the value of `experiment` may be null.
    """
    key, line = part.key_or_group, str(part.input_line)
    if part.is_sweep_override():
        raise UserError(f"{line}: several values are a sweep, which needs -m; a list is written [a,b].")
    is_none = part.value() is None and (key == "experiment" or part.is_delete())
    if key in GROUPS and not (is_none or isinstance(part.value(), str | dict)):
        raise UserError(f"{shorten(line)}: expected one name; there are {', '.join(choices_of(key))}.")


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")
