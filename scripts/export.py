"""Write a model for others: `python scripts/export.py checkpoint=FILE [--output FOLDER] [--format torch,onnx]`.

Takes every file that predict.py takes, an official one with model=NAME, and keys of the config on top (weights=raw,
data.image_size=384). FOLDER, by default CHECKPOINT.export beside it, gets each graph by torch.export (.pt2) and as ONNX
(.onnx), in fp32, for any batch, size of image and length of sentence; model.json, which says what goes in, what comes
out and what happens before; and a translator's tokenizer. Whoever uses them needs no Triptych.

Every file is read again and compared with the model on shapes that tracing has not seen. Where one differs by more than
1e-4 nothing is left behind. Leaves with 0, with 1 when answers differ, or with 2 when nothing can be exported.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a script sees its own folder, not the project's

from common.config.compose import configure
from common.errors import UserError
from common.files.table import table
from common.train.assembly import Components, restore, stored_config
from detr.tasks.detection import Detection
from scripts.exporting import classification, detection, graphs, translation, whole_folder
from scripts.exporting.graphs import Format
from scripts.exporting.plan import Plan, Row
from seq2seq.tasks.translation import Translation
from vit.tasks.classification import Classification

# Of logits their largest deviation from the mean, of probabilities and shares of an image 1. What differs is the order
# of fp32 sums, some 1e-6; tanh in place of the exact GELU, or another way to resample, would give more than this.
TOLERANCE = 1e-4
KINDS = {Detection: detection.plan, Classification: classification.plan, Translation: translation.plan}


class OtherAnswersError(Exception):
    """What was written does not answer as the model does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export what the command line names, compare it and print how it went; returns the exit code."""
    options, overrides = _options(sys.argv[1:] if arguments is None else list(arguments))
    sys.path.append(os.getcwd())  # a user's own package lies where the command is given
    try:
        _demand_packages(options.format)
        config = configure("evaluate", overrides, stored_config)
        config["trainer"] |= {"device": "cpu", "precision": "fp32"}
        checkpoint = Path(config["checkpoint"])
        output = options.output or checkpoint.with_suffix(".export")
        whole_folder.refuse(output)
        parts = restore(config)
        print(parts.weights_line)
        with whole_folder.replaced(output) as folder:
            export(parts, folder, options.format, checkpoint.name)
            written = sorted(folder.iterdir())
            sizes = ", ".join(f"{file.name} ({file.stat().st_size / 1e6:,.1f} MB)" for file in written)
    except UserError as error:
        print(str(error).replace("evaluate.py", "export.py"), file=sys.stderr)  # its config is borrowed
        return 2
    except OSError as error:
        print(f"{output} cannot be written ({error.strerror}); check its place and the disk.", file=sys.stderr)
        return 2
    except OtherAnswersError as error:
        print(f"OTHER ANSWERS: {error}; nothing was written")
        return 1
    print(f"wrote     {output}: {sizes}")
    print(f"same answers: the limit is {TOLERANCE:g}")
    return 0


def export(parts: Components, folder: Path, formats: Sequence[Format], checkpoint: str) -> None:
    """Write a model's graphs into `folder` in these formats, with what is told about them.

    Prints a table of differences. Raises OtherAnswersError for one above TOLERANCE, and UserError for a task that
    has no way out.
    """
    made = plan(parts)
    programs = {graph.name: graphs.trace(graph, made.sizes) for graph in made.graphs}
    rows = [("tokenizer", row) for row in made.rows]
    for form in formats:
        calls = {}
        for graph in made.graphs:
            path = folder / f"{graph.name}{graphs.ENDINGS[form]}"
            graphs.write(programs[graph.name], graph, path, form)
            calls[graph.name] = graphs.read(path, graph, form)
        rows += [(form, row) for row in made.compare(calls)]
    cells = [[form, row.what, row.output, f"{row.difference:.2g}"] for form, row in rows]
    print(table("largest differences from the model itself", [["file", "shape", "output", "difference"], *cells]))
    worst = max((row for _, row in rows), key=lambda row: row.difference)
    if not worst.difference <= TOLERANCE:
        raise OtherAnswersError(f"{worst.output} differ by {worst.difference:.2g} and the limit is {TOLERANCE:g}")
    told = description(made, formats, rows) | {
        "checkpoint": checkpoint,
        "weights": parts.weights_line.partition(": ")[2],
    }
    for name, text in {**made.files, whole_folder.MARK: json.dumps(told, indent=2, ensure_ascii=False)}.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def plan(parts: Components) -> Plan:
    """What is exported, by the kind of task; raises UserError for a kind that has no way out."""
    for kind, planned in KINDS.items():
        if isinstance(parts.task, kind):
            return planned(parts.model.float().eval().requires_grad_(False), parts.task)
    kinds = ", ".join(kind.__name__ for kind in KINDS)
    raise UserError(f"{type(parts.task).__name__} cannot be exported: there are ways for {kinds}.")


def description(made: Plan, formats: Sequence[Format], rows: Sequence[tuple[str, Row]]) -> dict[str, Any]:
    """What model.json says of the graphs."""
    told: dict[str, Any] = {"format": whole_folder.FORMAT, **made.about}
    told["sizes"] = {name: size.words for name, size in made.sizes.items()}
    told["graphs"] = {
        graph.name: {
            "files": {form: f"{graph.name}{graphs.ENDINGS[form]}" for form in formats},
            "inputs": {
                name: {"type": str(tensor.dtype).removeprefix("torch."), "shape": graph.shapes[name]}
                for name, tensor in graph.inputs.items()
            },
            "outputs": graph.outputs,
        }
        for graph in made.graphs
    }
    told["compared"] = {
        "limit": TOLERANCE,
        "rows": [{"file": form, **row._asdict()} for form, row in rows],
    }
    packages = ("torch", *(graphs.PACKAGES if "onnx" in formats else ()))
    told["versions"] = {package: metadata.version(package) for package in packages}
    return told


def _demand_packages(formats: Sequence[Format]) -> None:
    """Raise UserError where ONNX is asked for and cannot be written."""
    missing = next((name for name in graphs.PACKAGES if not util.find_spec(name)), None)
    if "onnx" in formats and missing:
        raise UserError(
            f'{missing} is not installed, which ONNX needs: pip install "triptych[export]", or give --format torch.'
        )


def _formats(text: str) -> list[Format]:
    chosen: list[Format] = [form for form in graphs.ENDINGS if form in text.split(",")]
    if len(chosen) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected torch, onnx, or torch,onnx")
    return chosen


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s checkpoint=FILE [key=value ...] [--output FOLDER] [--format torch,onnx]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="what to write (default: CHECKPOINT.export)")
    parser.add_argument("--format", type=_formats, default="torch,onnx", help="torch, onnx, or both (default)")
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
