"""Make a trained model smaller: `python scripts/compress.py checkpoint=FILE prune.heads=0.25 prune.neurons=0.5`.

FILE is any checkpoint that evaluate.py accepts. The keys are applied in this order:

    prune.heads=F      remove this fraction of all attention heads, those without which the loss on val is lowest
    prune.neurons=F    remove this fraction of the feed-forwards' hidden neurons, ranked by squared gradients on val
    prune.ranking=loss  rank neurons by the loss measured without groups of 8, a forward pass over the samples each
    rank=R             factorise the linear maps of blocks: an integer is the rank of all maps, a fraction below 1 the
                       part of the squared singular values, weighted by the inputs on val, that each map keeps
    prune.magnitude=F  set the smallest weights of blocks to zero: this fraction of all, at most 95 % of each matrix
    finetune=STEPS     then train for this many steps; prune.magnitude is reached gradually after three quarters of them
    distil=soft|hard   in fine-tuning, also learn from the outputs of the checkpoint (soft labels, or its best class)
    distil=sequence    in fine-tuning, learn the checkpoint's translations of the training sources; they are written to
                       FOLDER/distilled.tsv, alone if no other key is given, for train.py data.distilled=FILE
    quantize=int8      measure the ranges of the model's tensors on val, for trainer.precision=int8 on CPUs with VNNI or
                       AMX; without other keys, the file is FILE with the suffix .int8.pt, or the file in output=
    samples=N          number of val samples for ranking (default 256)
    output=FOLDER      folder to write (default: compressed)
    resume=auto        continue the fine-tuning of a command that was stopped, given again with this key

FOLDER/compressed.pt is an ordinary checkpoint without optimizer state, whose config holds the sizes of the smaller
modules (model.compressed). evaluate.py, predict.py and export.py take it, and the run of fine-tuning is in
FOLDER/finetune. Further keys override the checkpoint's config, such as optimizer.lr=1e-4 for fine-tuning.

--report compares models on test: checkpoint=DENSE[,SEED2,...] variants=FILE[,FILE...] precisions=fp32,bf16. A table
with quality, bytes, parameters, milliseconds and the difference from the outputs of DENSE is printed, and written to
FOLDER/report.md and FOLDER/report.json (default folder: report). Together with the keys above, the new file is one of
the variants. The exit code is 0, or 2 after an error.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.cli.command import to_run
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.check import COMPRESSED
from common.errors import Stopped, UserError
from common.files import checkpoint, names
from common.files.output import create_output, creating, writing_to
from common.files.table import table
from common.nn.compressed import Sizes
from common.train import sparsity
from common.train.assembly import Components, restore
from scripts.compressing import finetuning, int8, report, sequence
from scripts.compressing.low_rank import reduce_rank
from scripts.compressing.measuring import Measure, evaluate
from scripts.compressing.options import FILE, Options, read_options
from scripts.compressing.pruning import remove_heads, remove_neurons


def main(arguments: Sequence[str] | None = None) -> int:
    """Compress the checkpoint, or report, or both; returns the exit code."""
    console.guard()
    flags, words = _flags(sys.argv[1:] if arguments is None else list(arguments))
    try:
        options = read_options(words, flags.report)
        files = list(options.variants)
        if options.compresses:
            files.append(compress(options))
        elif options.quantizes:
            files.append(calibrate(options))
        elif options.translates:
            translate(options)
        if flags.report:
            rows = report.measure(options.checkpoints, files, options.precisions, options.overrides)
            print(report.show(rows))
            report.write(rows, options.folder)
            print(f"wrote     {options.folder}: report.md, report.json")
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "compress.py"), file=sys.stderr)
        return 2
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.code
    return 0


def compress(options: Options) -> Path:
    """Compress the first checkpoint as the options say; returns the new file.

    Prints a table with the goal's value on val and the number of parameters after each step.
    """
    file = options.folder / FILE
    if file.exists() and not options.resumes:
        advice = ", or add resume=auto to continue its fine-tuning" if options.run_folder.exists() else ""
        raise UserError(f"output={options.folder} already holds {FILE}; name another folder{advice}.")
    rows: list[list[Any]] = []
    if file.exists():
        finetuning.refuse_other_keys(file, options)
    else:
        parts = _compress_anew(file, options, rows)
    if options.steps is not None:
        finetuning.finetune(file, options)
        parts = restore(finetuning.without_teacher(finetuning.evaluation_config(file, options.overrides)))
        rows.append(_row(f"after {options.steps} steps of fine-tuning", parts))
    ranges = int8.calibrate(parts) if options.quantizes else None
    print(table(f"val, {parts.data.count('val')} samples", [_header(parts), *rows]))
    if ranges is not None:
        with writing_to(options.folder):
            checkpoint.save(file, {**checkpoint.load(file), "int8": ranges})
    print(f"wrote     {file}: {file.stat().st_size / 1e6:,.2f} MB")
    print(f"evaluate  {to_run('evaluate.py')} {names.shell_command([f'checkpoint={file}'])}")
    return file


def _compress_anew(file: Path, options: Options, rows: list[list[Any]]) -> Components:
    """Write the compressed checkpoint before fine-tuning, and add a row for each step; returns the compressed model."""
    config = finetuning.evaluation_config(options.checkpoints[0], options.overrides)
    parts = restore(finetuning.without_teacher(config))
    assert parts.file is not None
    finetuning.refuse_mistakes(options, config)
    create_output(options.folder)
    print(parts.weights_line)
    if note := finetuning.lost_zeros(parts.model, options):
        print(note)
    if options.translates:
        sequence.translate_train(parts, options.folder)
    rows.append(_row("dense", parts))
    sizes = apply(parts, options, config, rows)
    if options.quantizes:
        int8.calibrate(parts)  # which may be refused, so before a file is written
    with writing_to(options.folder):
        checkpoint.save(file, {**content(parts, config, sizes), "compression": options.making})
    return parts


def calibrate(options: Options) -> Path:
    """Write the first checkpoint with the ranges of its tensors on val, and print the metrics; returns the new file."""
    if options.output is not None and options.output.exists():
        raise UserError(f"output={options.output} exists already; name another file.")
    overrides = [*options.overrides, "trainer.device=cpu", "trainer.precision=fp32"]
    config = finetuning.evaluation_config(options.checkpoints[0], overrides)
    parts = restore(config)
    assert parts.file is not None
    file, ranges = options.output or parts.file.with_suffix(".int8.pt"), int8.calibrate(parts)
    with creating(file):
        checkpoint.save(file, int8.content(parts, config, ranges))
    print(f"{parts.weights_line}\nwrote     {file}")
    print(int8.report(parts, ranges))
    command = names.shell_command([f"checkpoint={file}", "trainer.precision=int8"])
    print(f"evaluate  {to_run('evaluate.py')} {command}")
    return file


def translate(options: Options) -> None:
    """Write the translations of the training sources by the first checkpoint, for training a student on them."""
    config = finetuning.evaluation_config(options.checkpoints[0], options.overrides)
    finetuning.refuse_mistakes(options, config)
    parts = restore(finetuning.without_teacher(config))
    create_output(options.folder)
    print(parts.weights_line)
    file = sequence.translate_train(parts, options.folder)
    print(f"train     {to_run('train.py')} model=NAME {names.shell_command([f'data.distilled={file}'])}")


def apply(parts: Components, options: Options, config: dict[str, Any], rows: list[list[Any]]) -> Sizes:
    """Compress the model in place, and add a row for each step; returns the sizes of all its smaller modules."""
    former = config["model"].get(COMPRESSED) or {}
    sizes = {key: dict(former.get(key, {})) for key in ("heads", "neurons", "ranks")}
    measure = Measure(parts, options.samples)
    if options.heads is not None:
        sizes["heads"] |= remove_heads(parts.model, measure, options.heads)
        rows.append(_row(f"heads {options.heads:.0%} fewer", parts))
    if options.neurons is not None:
        sizes["neurons"] |= remove_neurons(parts.model, measure, options.neurons, options.ranking == "loss")
        rows.append(_row(f"neurons {options.neurons:.0%} fewer", parts))
    if options.rank is not None:
        sizes["ranks"] |= reduce_rank(parts.model, measure, options.rank)
        rows.append(_row(f"rank {options.rank:g}", parts))
    if options.magnitude is not None and options.steps is None:
        weights = sparsity.prunable_weights(parts.model)
        sparsity.zero_smallest(list(weights.values()), options.magnitude)
        rows.append(_row(f"{options.magnitude:.0%} of blocks' weights zero", parts))
    return Sizes(**sizes)


def content(parts: Components, config: dict[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the content of the compressed checkpoint: no state of the optimizer, and one set of weights."""
    assert parts.file is not None
    stored = checkpoint.load(parts.file)
    ours = checkpoint.is_ours(stored)
    sections = {key: value for key, value in config.items() if isinstance(value, dict)}
    own = {**(stored["config"] if ours else {"seed": 0}), **sections}
    compressed = {COMPRESSED: dataclasses.asdict(sizes)} if any(dataclasses.astuple(sizes)) else {}
    return {
        "step": stored["step"] if ours else 0,
        "model": {name: tensor.cpu() for name, tensor in parts.model.state_dict().items()},
        "average": None,
        "task": parts.task.state(),
        "config": {**own, "model": {**own["model"], **compressed}},
    }


def _header(parts: Components) -> list[str]:
    return ["model", f"val/{parts.task.goal.name}", "parameters", "not zero"]


def _row(name: str, parts: Components) -> list[Any]:
    """The goal's value on val, and the numbers of all parameters and of those that are not zero."""
    goal = evaluate(parts, "val")[parts.task.goal.name]
    return [name, float(goal), *report.count_parameters(parts.model)]


def _flags(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s checkpoint=FILE [key=value ...] [--report]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--report", action="store_true", help="compare the models on test")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    start.script(main)
