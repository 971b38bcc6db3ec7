"""Fine-tune a compressed checkpoint by the ordinary trainer, and keep its best weights."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

import train
from common.config.compose import TRAINING_ONLY, Command, configure
from common.errors import UserError
from common.files import checkpoint, run_folder
from common.files.output import writing_to
from common.train import sparsity
from common.train.assembly import stored_config
from common.train.state import select_weights
from scripts.compressing import sequence
from scripts.compressing.options import Options

RAMP = 0.75  # of the steps of fine-tuning, until all weights that will be zero are zero
MIN_ZEROS = 0.01  # share of weights from which zeros are taken for those of an earlier pruning
INCREASES = 100  # of the number of zeros in these steps
TRAINING_KEYS = {"seed", "resume", "allow_changes", *TRAINING_ONLY}  # without effect in evaluation


def evaluation_config(file: Path, overrides: list[str]) -> dict[str, Any]:
    """Compose the config of a checkpoint as evaluate.py does; keys of training alone are left out."""
    known = [word for word in overrides if word.partition("=")[0] not in TRAINING_KEYS]
    return configure("evaluate", [f"checkpoint={file}", *known], stored_config)


def without_teacher(config: dict[str, Any]) -> dict[str, Any]:
    """A copy of a config without the teacher of a distilled model, whose loss is then that of the labels alone."""
    config = copy.deepcopy(config)
    if config["task"].get("distillation"):
        config["task"]["distillation"]["teacher"] = None
    return config


def refuse_mistakes(options: Options, config: dict[str, Any]) -> None:
    """Raise UserError for a task that cannot learn from a teacher, before anything is computed."""
    if options.translates:
        sequence.refuse_others(config)
    elif options.distil and "distillation" not in config["task"]:
        name = str(config["task"]["_target_"]).rpartition(".")[2]
        raise UserError(f"distil={options.distil}: {name} does not learn from a teacher's outputs; leave it out.")


def lost_zeros(model: nn.Module, options: Options) -> str | None:
    """A note if fine-tuning will fill weights that an earlier prune.magnitude has set to zero."""
    if options.steps is None or options.magnitude is not None:
        return None
    weights = sparsity.prunable_weights(model).values()
    share = sum(int((w == 0).sum()) for w in weights) / max(1, sum(w.numel() for w in weights))
    if share < MIN_ZEROS:
        return None
    remedy = f"add prune.magnitude={share:.2g} to keep them"
    return f"note      {share:.0%} of the blocks' weights are zero, and fine-tuning fills them; {remedy}"


def refuse_other_keys(file: Path, options: Options) -> None:
    """Raise UserError unless a compressed checkpoint, whose fine-tuning is resumed, was made by the keys in `options`.

    Files of earlier versions do not say by which keys they were made.
    """
    made = checkpoint.load(file, ("compression",)).get("compression", options.making)
    for key in sorted({*made, *options.making}):
        before, now = made.get(key), options.making.get(key)
        if before != now:
            was = "without this key" if before is None else f"with {key}={before}"
            raise UserError(
                f"{file} was made {was}, and resume=auto needs the keys of the first command; "
                f"{f'leave {key}= out' if before is None else f'give {key}={before}'}, or another output=."
            )


def finetune(file: Path, options: Options) -> None:
    """Train the model of a compressed checkpoint, and replace the checkpoint's weights by the best ones on val.

    The run is in `options.run_folder`, where `options.resumes` continues it. Its learning rates are those of the
    checkpoint's config, unless they are overridden.
    """
    folder = options.run_folder
    own = [f"checkpoint={file}", f"run_dir={folder}", *(["resume=auto"] if options.resumes else [])]
    command = Command("train", [*own, *_keys(options)], stored_config)
    command.prepare()
    composed = command.checked()
    if "keep_tokenizers" in composed.config["task"]:
        composed.config["task"]["keep_tokenizers"] = True
    run_folder.run_in(train.train, composed.config, folder)
    content, best = checkpoint.load(file), checkpoint.load(_best(folder))
    with writing_to(file.parent):
        checkpoint.save(file, {**content, "step": best["step"], "model": select_weights(best)})


def _keys(options: Options) -> list[str]:
    """The overrides of the checkpoint's config for fine-tuning."""
    keys = [f"trainer.steps={options.steps}", "trainer.epochs=null", "trainer.average_last=0"]
    if options.magnitude is not None and options.steps is not None:
        every = max(1, round(RAMP * options.steps / INCREASES))
        keys.append(f"trainer.sparsity={{fraction:{options.magnitude},ramp:{RAMP},every:{every}}}")
    if options.translates:
        keys.append(f"data.distilled={options.folder / sequence.TEXT}")
    elif options.distil:
        teacher = options.checkpoints[0]
        keys += [f"task.distillation.teacher={teacher}", f"task.distillation.kind={options.distil}"]
    evaluation = ("weights=", "split=", "details=")
    return keys + [word for word in options.overrides if not word.startswith(evaluation)]


def _best(folder: Path) -> Path:
    """The best checkpoint of a run on val; without a best one, the last."""
    best = folder / "checkpoints" / "best.pt"
    return best if best.exists() else sorted((folder / "checkpoints").glob("step_*.pt"))[-1]
