"""Build data, task and model from a checked config, and load a checkpoint's weights into the model."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from common.config.check import build, build_model, construct
from common.config.compose import configure
from common.config.diff import TEACHER_PATH
from common.config.schema import WINGS
from common.errors import UserError
from common.files import checkpoint, schema
from common.files.content import TO_RESTORE
from common.files.names import shell_command
from common.machine import device as devices
from common.machine import distributed, memory, threads
from common.nn import quantisation
from common.task import Adopted, Data, Task, Teacher
from common.train import footprint, teacher
from common.train.state import describe, select_weights
from common.train.trainer import Trainer
from common.weights import fetching, unwrapping, values

T = TypeVar("T")


class Components(NamedTuple):
    """The objects built from a config.

    `weights_line` is the text for the log on the origin of the model's weights: one line, followed by a line for each
    note or warning. `pretrained` is False if all weights are initialised at random. `file` is the path of the
    checkpoint that `restore` has read; None after `assemble`.
    """

    data: Data
    task: Task
    model: nn.Module
    trainer: Trainer
    device: torch.device
    weights_line: str
    pretrained: bool = True
    file: Path | None = None


def assemble(config: dict[str, Any], *, resumed_state: dict[str, Any] | None = None) -> Components:
    """Build data, task and model for the start of a run, on the CPU.

    Data and task are built before the model, because they determine some of the model's arguments. A new run starts
    from the weights in the config's `checkpoint`; tensors that do not match are re-initialised and listed. If
    `checkpoint` is empty, the model may load weights itself, such as those of a backbone
    (`OptionalModel.fetch_weights`), or the task may load some into the model (`OptionalTask.fetch_weights`).

    For a resumed run, `resumed_state` is the task state from task.json in the run's folder, and the trainer loads the
    weights later. For a new run it is None. Before the model is built, the task may take over a part of `resumed_state`
    or of the task state in `checkpoint`, such as tokenizers (`OptionalTask.inherit`), and receives the teacher that it
    names, on the device of the run (`OptionalTask.set_teacher`).
    """
    trainer, device = _trainer(config)
    data: Data = build(config["data"])
    task: Task = build(config["task"], data=data)
    source = fetching.locate(config) if config["checkpoint"] and resumed_state is None else None
    inherited = resumed_state if source is None else _read(source.path, task).task_state
    if inherited is not None and hasattr(task, "inherit"):
        file = source.path if source else Path("task.json")  # in the run's folder
        _check_task_state(task, inherited, file, lambda: stored_config(file) if source else config)
        _with_path(file, task.inherit, inherited)
    footprint.refuse_oversize(config, task, device, training=True)
    teacher_notes = _provide_teacher(task, config)
    torch.manual_seed(config["seed"])
    model: nn.Module = build_model(config["model"], task)
    loaded: str | None = None
    if resumed_state is not None:
        loaded = "weights   from the run's own last checkpoint"
    elif source is not None:
        loaded = load_initial_weights(model, task, source.path, source.title)
    elif fetch := getattr(model, "fetch_weights", None):
        loaded = fetch()
    elif fetch := getattr(task, "fetch_weights", None):
        loaded = fetch(model)
    line = _with_notes(loaded or "weights   initialised at random", teacher_notes, [])
    return Components(data, task, model, trainer, device, line, pretrained=loaded is not None)


def restore(config: dict[str, Any]) -> Components:
    """Load the task and the model from the config's `checkpoint`.

    The model is moved to the config's device and set to evaluation mode.

    The file is a checkpoint of this program, or a file of another program that the task can convert (`Task.adopt`). No
    file of the data is opened. With trainer.precision=int8, the model is quantised by the ranges in the checkpoint.
    Raises UserError when the file's weights do not match the model that the config describes, and when int8 is not
    possible.
    """
    trainer, device = _trainer(config)
    path, title = fetching.locate(config)
    content = checkpoint.load(path, TO_RESTORE)
    data: Data = build(config["data"])
    task: Task = build(config["task"], data=data)
    if checkpoint.is_ours(content):
        _refuse_another_wing(content, task, path)
        state, tensors = content["task"], select_weights(content, config["weights"])
        notes: list[str] = []
        line = f"weights   {describe(path, content, config['weights'])}"
    else:
        content, notes = _with_path(path, unwrapping.select_kind, content, config["weights"])
        adopted = _adopt(task, content, path)
        state, tensors, notes = adopted.task_state, adopted.weights, [*notes, *adopted.notes]
        line = f"weights   {title}: imported" + _list_names(", without", adopted.left_out)
    restore_task(task, state, path, content["config"] if checkpoint.is_ours(content) else None)
    footprint.refuse_oversize(config, task, device, training=False)
    model: nn.Module = build_model(config["model"], task)
    values.refuse_other_kinds(model, tensors, path)
    notes = _adaptations(model, tensors) + notes
    tensors = _adapt(model, tensors)
    missing, _ = _match(model, tensors)
    unexpected = sorted(tensors.keys() - model.state_dict().keys())
    if missing or unexpected:
        first = (missing or unexpected)[0]
        raise UserError(
            f"{path} holds the weights of another model than model={type(model).__name__} as configured: "
            f"{len(missing)} tensors are missing or of another shape, {len(unexpected)} are unexpected, the first is "
            f"{first} ({_shape(tensors, first)} in the file, {_shape(model.state_dict(), first)} in the model); name "
            "the model that the file holds (model=...), and leave out keys that change shapes."
        )
    model.load_state_dict(tensors)
    model = model.to(device).eval()
    if trainer.precision == "int8":
        notes = [*notes, _quantise(model, content, path, config["checkpoint"], device)]
    line = _with_notes(line, notes, values.non_finite_note(tensors))
    return Components(data, task, model, trainer, device, line, file=path)


def load(file: str | Path, *overrides: str) -> tuple[nn.Module, Task]:
    """Load a checkpoint's model and task for a notebook; the model is in evaluation mode.

        model, task = load("runs/detr-shapes/.../checkpoints/best.pt")
        task.predict(model, "photo.jpg")

    `file` may also be the name of published weights (load("detr_r50")). `overrides` are config overrides as on the
    command line, such as "trainer.device=cpu". For a file of another program, one of them must name the model
    ("model=detr_r50"). The device is `trainer.device` of the checkpoint's config, by default CUDA if available, and
    otherwise the CPU. Warns of weights that are not finite. Raises UserError for the same mistakes as predict.py.

    The weights and the preprocessing are the same as in predict.py: the EMA weights if there are any, otherwise those
    of the last update. The override "weights=raw" selects those of the last update even if there are EMA weights. The
    precision differs: `task.predict` computes in fp32, and predict.py in `trainer.precision`, which is bf16 on many
    machines. For the same numbers as predict.py in bf16, call `task.predict` inside
    `with torch.autocast("cpu", torch.bfloat16):` (or "cuda").
    """
    config = configure("evaluate", [f"checkpoint={file}", *overrides], stored_config)
    parts = restore(config)
    for warning in values.non_finite_note(parts.model.state_dict()):
        warnings.warn(f"{file}: {warning}", stacklevel=2)
    return parts.model, parts.task


def _quantise(model: nn.Module, content: dict[str, Any], path: Path, source: str, device: torch.device) -> str:
    """Quantise a model by the ranges in its checkpoint's `content`; returns a note for the log.

    `path` is the checkpoint's file, and `source` the value of checkpoint=, which may be the name of published weights.
    Raises UserError if the checkpoint was not calibrated or is calibrated for another model, and if the machine cannot
    compute in int8.
    """
    quantisation.refuse_unsupported(device)
    ours = checkpoint.is_ours(content)
    if not (ranges := content.get("int8") if ours else None):
        command = shell_command(["python", "scripts/compress.py", f"checkpoint={source}", "quantize=int8"])
        raise UserError(
            f"trainer.precision=int8 needs ranges of the model's tensors, and {path} has none; measure them on val: "
            f"{command}{'' if ours else ', with the keys of this command that choose the model and the data'}."
        )
    count = _with_path(path, quantisation.quantise, model, ranges)
    return f"{count} linear maps and convolutions are in int8, all else in {devices.resolve_precision('auto', device)}"


def _provide_teacher(task: Task, config: dict[str, Any]) -> list[str]:
    """Load the teacher that the task names, if any, and pass it to the task; returns notes for the log.

    The teacher has the weights with which it is evaluated (EMA, if there are any). It is on the device of the run, in
    evaluation mode and without gradients. Raises UserError, which names the key of the teacher, if it cannot be loaded
    or does not suit the task.
    """
    file = getattr(task, "teacher_file", None)
    set_teacher = getattr(task, "set_teacher", None)
    if file is None or set_teacher is None:
        return []
    keys = [f"trainer.{key}={config['trainer'][key]}" for key in ("device", "precision")]
    keys += [f"cache_dir={config['cache_dir']}", *([f"trust=[{','.join(config['trust'])}]"] if config["trust"] else [])]
    try:
        parts = restore(configure("evaluate", [f"checkpoint={file}", *keys], _teacher_config))
        model = parts.model.requires_grad_(False)
        title = parts.weights_line.partition("\n")[0].removeprefix("weights").strip()
        return list(set_teacher(Teacher(model, parts.task, title, teacher.digest(model))))
    except UserError as error:
        raise UserError(f"{TEACHER_PATH}={file}: {error}") from error


def _teacher_config(path: Path) -> dict[str, Any]:
    """Return the config in a teacher's checkpoint; raises UserError for a file of another program, which has none."""
    config = stored_config(path)
    if not config:
        command = shell_command(["python", "scripts/import_weights.py", f"checkpoint={path}", "model=NAME"])
        raise UserError(
            "a file of another program does not say which model it holds; write it as a checkpoint, which does: "
            f"{command}."
        )
    return config


def stored_config(path: Path) -> dict[str, Any]:
    """Return the config that a checkpoint of this program holds; empty for a file of another program."""
    content = checkpoint.load(path, ("config",))
    return content["config"] if checkpoint.is_ours(content) else {}


def load_initial_weights(model: nn.Module, task: Task, path: Path, title: str | None = None) -> str:
    """Load a checkpoint's weights into a new run's model; tensors that do not match keep their initial values.

    A tensor does not match when its shape differs. The tensors that the model lists in `decided_by_data`, such as a
    classifier, do not match either if the task states of the checkpoint and of the run differ: two classifiers of 80
    classes may be for different classes. Returns a line for the log, followed by a line for each note or warning. The
    first line names the file by `title`, or by its path if `title` is None. Raises UserError when no weight matrix
    matches, or when a tensor that does not match is one that the model does not train.
    """
    adopted = _read(path, task)
    values.refuse_other_kinds(model, adopted.weights, path)
    notes = [*_adaptations(model, adopted.weights), *adopted.notes]
    tensors = _adapt(model, adopted.weights)
    reset = tuple(getattr(model, "decided_by_data", ())) if adopted.task_state != task.state() else ()
    tensors = {k: v for k, v in tensors.items() if not any(k == part or k.startswith(f"{part}.") for part in reset)}
    missing, matching = _match(model, tensors)
    if not any(tensor.ndim > 1 for tensor in matching.values()):  # biases and norms can match by chance
        raise UserError(
            f"{path} has no weight matrix that matches the model; give a checkpoint of the same kind and size, or none."
        )
    _refuse_random_and_fixed(model, missing, path)
    model.load_state_dict(matching, strict=False)
    unused = sorted((tensors.keys() - matching.keys()) - set(missing)) + adopted.left_out
    loaded = f"weights   {title or path}: {len(matching)} tensors"
    loaded += _list_names("; re-initialised:", missing) + _list_names("; unused:", unused)
    return _with_notes(loaded, notes, values.non_finite_note(matching))


def _refuse_random_and_fixed(model: nn.Module, missing: Sequence[str], path: Path) -> None:
    """Raise UserError if parameters that are not trained would keep their random initial values."""
    fixed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    if names := [name for name in missing if name in fixed]:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise UserError(
            f"{path} has no matching {names[0]}{others}, which the model does not train, so they would stay random; "
            "give a checkpoint of the same model and classes, or train them (model.frozen=false and "
            "model.backbone.frozen=0)."
        )


def _read(path: Path, task: Task) -> Adopted:
    """Read the weights and the task state from a checkpoint of this program or of another one."""
    content = checkpoint.load(path, TO_RESTORE)
    if not checkpoint.is_ours(content):
        return _adopt(task, content, path)
    _refuse_another_wing(content, task, path)
    return Adopted(select_weights(content), content["task"], [])


def _refuse_another_wing(content: dict[str, Any], task: Task, path: Path) -> None:
    """Raise UserError for a checkpoint of another wing (detr, vit, seq2seq); some tensors might match by chance."""
    theirs = str(content["config"].get("task", {}).get("_target_", ""))
    ours = f"{type(task).__module__}.{type(task).__qualname__}"
    wings = {name.split(".")[0] for name in (theirs, ours)}
    if len(wings) > 1 and wings <= set(WINGS):
        raise UserError(
            f"{path} was trained for {theirs} and this run is {ours}, which is another problem; give a checkpoint of "
            "the same kind, or leave out model= and data= to use those of the checkpoint."
        )


def _adopt(task: Task, content: dict[str, Any], path: Path) -> Adopted:
    try:
        return _with_path(path, task.adopt, content, path.parent)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:
        if memory.is_out_of_memory(error):
            raise
        # These errors of PyTorch and Python describe a wrong shape well, so `adopt` need not check each tensor itself.
        reason = str(error).partition("\n")[0][:160]
        raise UserError(
            f"{path} has tensors whose shapes or types are not those of a supported model ({reason}); give a file as "
            "it was published."
        ) from error


def restore_task(task: Task, state: dict[str, Any], path: Path, config: dict[str, Any] | None = None) -> None:
    """Restore a task from the state in a checkpoint; `config` is the checkpoint's config, None if unknown.

    Raises UserError, which names the file `path`, if the state does not suit the task.
    """
    _check_task_state(task, state, path, lambda: config or {})
    _with_path(path, task.restore, state)


def _check_task_state(task: Task, state: dict[str, Any], path: Path, config: Callable[[], dict[str, Any]]) -> None:
    """Raise UserError unless a task state has the types that the task declares (`OptionalTask.state_schema`).

    `config` returns the config that was stored with the state; the message says if it is that of another task. If a
    class overrides `restore` but not `state_schema`, nothing is checked, because its state may have other types than
    the inherited `state_schema` declares.
    """
    owner = next((base for base in type(task).__mro__ if {"state_schema", "restore"} & vars(base).keys()), type(task))
    declared = getattr(task, "state_schema", None) if "state_schema" in vars(owner) else None
    if declared is not None and (mistake := schema.mistake(state, declared, "task")):
        theirs, ours = config().get("task", {}).get("_target_"), f"{type(task).__module__}.{type(task).__qualname__}"
        if theirs not in (None, ours):
            raise UserError(
                f"{path} was trained for {theirs}, and its state does not suit {ours} ({mistake}); leave out model= to "
                "use the checkpoint's own task, or give a checkpoint of the same task."
            )
        raise UserError(f"{path} was altered, or not written by this program: {mistake}; give another file.")


def _with_path(path: Path, function: Callable[..., T], *arguments: Any) -> T:
    """Return `function(*arguments)`; if it raises UserError, put the file's name before the text of the error."""
    try:
        return function(*arguments)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _adapt(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `model.adapt(tensors)` if the model has this method (see `OptionalModel`), else the tensors."""
    adapt = getattr(model, "adapt", None)
    return adapt(tensors) if adapt else tensors


def _adaptations(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return sentences on the changes that `_adapt` makes; none if the model has no method `adaptations`."""
    adaptations = getattr(model, "adaptations", None)
    return list(adaptations(tensors)) if adaptations else []


def _with_notes(line: str, notes: list[str], warnings: list[str]) -> str:
    """Return `line` followed by a line for each note and each warning."""
    return "\n".join([line, *(f"note      {n}" for n in notes), *(f"warning   {warning}" for warning in warnings)])


def _match(model: nn.Module, tensors: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Match `tensors` with the model's state dict by name and shape.

    Returns the names in the state dict that have no match, and the matching tensors.
    """
    state = model.state_dict()
    matching = {name: t for name, t in tensors.items() if name in state and state[name].shape == t.shape}
    return [name for name in state if name not in matching], matching


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    """The shape of a tensor, such as "64 x 3", or "missing"."""
    return (" x ".join(map(str, tensors[name].shape)) or "a scalar") if name in tensors else "missing"


def _list_names(prefix: str, names: list[str]) -> str:
    """Return `prefix` followed by the first twelve of `names`, or an empty text if there are no names."""
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{prefix} {', '.join(names[:12])}{more}" if names else ""


def _trainer(config: dict[str, Any]) -> tuple[Trainer, torch.device]:
    trainer: Trainer = construct(Trainer, config["trainer"])
    device = devices.select(trainer.device, distributed.local_rank())
    precision = devices.resolve_precision(trainer.precision, device)
    workers = threads.worker_count(trainer.workers, distributed.local_world_size())
    return replace(trainer, precision=precision, workers=workers), device
