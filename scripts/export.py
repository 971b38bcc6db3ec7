"""Export a model: `python scripts/export.py checkpoint=FILE [--output FOLDER] [--format LIST] [--size HxW]`.

FILE is any checkpoint that predict.py accepts, or the name of published weights (configs/weights.yaml). A file that
another program wrote also needs model=NAME. Further keys override the checkpoint's config, such as weights=raw or
data.image_size=384.

FOLDER (default: the checkpoint's path with the suffix .export) receives the model's graphs, a file model.json that
describes inputs, outputs and preprocessing, and the tokenizers of a model of text. Each graph is written in the format
of torch.export (.pt2) and as ONNX (.onnx), or in the formats that --format lists: torch, onnx, openvino (.xml and .bin)
and onnx_int8 (ONNX with linear maps in int8). Other graphs compute in fp32, but OpenVINO takes bf16 on CPUs that have
it, unless INFERENCE_PRECISION_HINT is f32. They accept any batch size, image size and sentence length within the limits
that model.json states. With --size HxW, the graph of a classifier of images or of a detector accepts only images of H
by W pixels; for a classifier, this is the size of its data. Using the files does not require Triptych. A translator
with post-norm blocks can also be written for CTranslate2, which searches itself: ctranslate2 (in fp32) and
ctranslate2_int8 are folders.

Each graph is read back from its file, and its outputs are compared with the model's, for input shapes that were not
used in tracing, and its time is measured. For CTranslate2, the outputs are log probabilities of given translations. If
outputs differ by more than 1e-4 (OpenVINO: 0.01, int8: 0.1), nothing is written. The exit code is 0, or 1 if outputs
differ, or 2 if nothing can be exported.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import metadata, util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # Python adds only the script's own folder

from common.cli import start
from common.machine import console, threads

os.environ.update(threads.missing_settings(os.environ))  # before torch is imported

from common.config.compose import configure
from common.errors import UserError
from common.files.output import creating
from common.files.table import table
from common.train.assembly import Components, restore, stored_config
from detr.tasks.cnn_detection import CnnDetection
from detr.tasks.detection import Detection
from scripts.exporting import (
    classification,
    ctranslate2_folder,
    detection,
    graphs,
    image_modelling,
    language_modelling,
    masked_autoencoding,
    single_texts,
    translators,
    whole_folder,
)
from scripts.exporting.plan import Comparison, GraphFunction, Plan
from scripts.exporting.timing import ROUNDS, timing_rows
from seq2seq.tasks.language_modelling import LanguageModelling
from seq2seq.tasks.masked_language_modelling import MaskedLanguageModelling
from seq2seq.tasks.sentence_classification import SentenceClassification
from seq2seq.tasks.translation import Translation
from vit.tasks.classification import Classification
from vit.tasks.image_modelling import ImageModelling
from vit.tasks.masked_autoencoding import MaskedAutoencoding

# The largest accepted difference between outputs. For logits, the difference is divided by the logits' largest
# deviation from their mean. For probabilities and relative coordinates, it is absolute. For tokenizers, it is the
# fraction of texts with different results. Adding fp32 numbers in another order gives differences of about 1e-6.
# Approximating GELU by tanh, or resampling position embeddings by another method, gives more than 1e-4. OpenVINO does
# the latter. int8 rounds weights and activations.
TOLERANCE = 1e-4
LIMITS = {
    **{"tokenizer": TOLERANCE, "torch": TOLERANCE, "onnx": TOLERANCE, "openvino": 0.01, "onnx_int8": 0.1},
    **{"ctranslate2": TOLERANCE, "ctranslate2_int8": 0.1},
}
Format = graphs.Format | ctranslate2_folder.Format
PACKAGES: dict[str, tuple[str, ...]] = {  # needed for the export, besides torch
    **graphs.PACKAGES,
    **dict.fromkeys(ctranslate2_folder.COMPUTE_TYPES, ("ctranslate2",)),
}
PLANNERS: dict[type, Callable[..., Plan]] = {
    Detection: detection.plan,
    Classification: classification.plan,
    ImageModelling: image_modelling.plan,
    MaskedAutoencoding: masked_autoencoding.plan,
    Translation: translators.plan,
    LanguageModelling: language_modelling.plan,
    MaskedLanguageModelling: single_texts.plan_masked,
    SentenceClassification: single_texts.plan_classes,
}


SIZED = (Detection, Classification)  # the tasks whose graphs may accept images of one size alone


class OutputMismatchError(Exception):
    """The outputs of an exported file differ from the model's by more than the limit of its format."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Export the checkpoint, compare the files with the model and print the result; returns the exit code."""
    console.guard()
    options, overrides = _options(sys.argv[1:] if arguments is None else list(arguments))
    try:
        _require_packages(options.format)
        config = configure("evaluate", overrides, stored_config)
        config["trainer"] |= {"device": "cpu", "precision": "fp32"}
        checkpoint = Path(config["checkpoint"])
        output = options.output or checkpoint.with_suffix(".export")
        whole_folder.check_output(output)
        parts = restore(config)
        print(parts.weights_line)
        with creating(output), whole_folder.atomic_folder(output) as folder:
            export(parts, folder, options.format, checkpoint.name, options.size)
            files = sorted(file for file in folder.rglob("*") if file.is_file())
            summary = ", ".join(f"{file.relative_to(folder)} ({file.stat().st_size / 1e6:,.1f} MB)" for file in files)
    except UserError as error:
        # The config is composed as for evaluate.py, so the error messages name evaluate.py, which is replaced here.
        print(str(error).replace("evaluate.py", "export.py"), file=sys.stderr)
        return 2
    except OutputMismatchError as error:
        print(f"OUTPUTS DIFFER: {error}; nothing was written")
        return 1
    print(f"wrote     {output}: {summary}")
    print(f"outputs agree within {', '.join(f'{LIMITS[form]:g} ({form})' for form in options.format)}")
    return 0


def export(
    parts: Components, folder: Path, formats: Sequence[Format], checkpoint: str, size: tuple[int, int] | None = None
) -> None:
    """Write a model's graphs and folders, the tokenizer files of a model of text, and model.json into `folder`.

    `checkpoint` is the name of the checkpoint's file, for model.json. `size` is the only (height, width) of images that
    the graph accepts, or None. Prints a table of the differences between the files' outputs and the model's, and one of
    their times. Raises OutputMismatchError if a difference is above the limit of its format (LIMITS), and UserError for
    a task or a model that cannot be exported.
    """
    plan = make_plan(parts, size)
    for note in plan.notes:
        print(f"note      {note}")
    comparisons: list[tuple[str, Comparison]] = [("tokenizer", comparison) for comparison in plan.comparisons]
    engines, compared = _write_folders(parts, folder, formats)
    contenders, graph_comparisons = _write_graphs(plan, folder, [form for form in formats if form in graphs.ENDINGS])
    comparisons += [*compared, *graph_comparisons]
    cells = [[name, row.inputs, row.output, f"{row.difference:.2g}"] for name, row in comparisons]
    print(table("largest differences from the model", [["file", "shape", "output", "difference"], *cells]))
    for name, row in comparisons:
        if not row.difference <= LIMITS[name]:
            raise OutputMismatchError(
                f"{row.output} of {name} differ by {row.difference:.2g}, but the limit is {LIMITS[name]:g}"
                f"{_size_hint(plan)}"
            )
    if len(contenders) > 1:
        print(table(f"milliseconds, medians of {ROUNDS} rounds in turn", timing_rows(plan.graphs, contenders)))
    for form, engine in engines.items():
        pairs = ctranslate2_folder.searches(engine)
        print(table(f"{form}, milliseconds, medians of {ROUNDS} rounds", ctranslate2_folder.timing_rows(pairs)))
    content = description(plan, formats, comparisons) | {
        "checkpoint": checkpoint,
        "weights": parts.weights_line.partition("\n")[0].partition(": ")[2],
    }
    if engines:
        content["ctranslate2"] = ctranslate2_folder.description(engines)
    content["files"] = sorted({*(file.name for file in folder.iterdir()), *plan.files, whole_folder.DESCRIPTION_FILE})
    texts = {**plan.files, whole_folder.DESCRIPTION_FILE: json.dumps(content, indent=2, ensure_ascii=False)}
    for name, text in texts.items():
        (folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def _write_folders(
    parts: Components, folder: Path, formats: Sequence[Format]
) -> tuple[dict[ctranslate2_folder.Format, ctranslate2_folder.Contender], list[tuple[str, Comparison]]]:
    """Write the model for CTranslate2; returns it as read back in each format, and comparisons with the model."""
    engines: dict[ctranslate2_folder.Format, ctranslate2_folder.Contender] = {}
    comparisons: list[tuple[str, Comparison]] = []
    for form in ctranslate2_folder.COMPUTE_TYPES:
        if form in formats:
            engines[form] = engine = ctranslate2_folder.write(parts.model, parts.task, folder / form, form)
            comparisons += [(form, row) for row in ctranslate2_folder.compare(engine)]
    return engines, comparisons


def _write_graphs(
    plan: Plan, folder: Path, formats: Sequence[Any]
) -> tuple[dict[str, dict[str, GraphFunction]], list[tuple[str, Comparison]]]:
    """Write all graphs in each format.

    Returns the graphs as functions, those of the model under "model" and those read back under their formats, and the
    comparisons of the latter with the model.
    """
    contenders: dict[str, dict[str, GraphFunction]] = {"model": {graph.name: graph.module for graph in plan.graphs}}
    comparisons: list[tuple[str, Comparison]] = []
    programs = {graph.name: graphs.trace(graph, plan.dimensions) for graph in plan.graphs} if formats else {}
    for form in formats:
        functions = contenders[form] = {}
        for graph in plan.graphs:
            path = folder / f"{graph.name}{graphs.ENDINGS[form]}"
            graphs.write(programs[graph.name], graph, path, form)
            functions[graph.name] = graphs.read(path, graph, form)
        comparisons += [(form, comparison) for comparison in plan.compare(functions)]
    return contenders, comparisons


def make_plan(parts: Components, size: tuple[int, int] | None = None) -> Plan:
    """Plan the export of a checkpoint's model, for images of `size` (height, width) alone unless it is None.

    Raises UserError for a task, a model or a size that cannot be exported.
    """
    for task_class, planner in PLANNERS.items():
        if isinstance(parts.task, task_class):
            if size is not None and task_class not in SIZED:
                raise UserError(
                    f"--size {size[0]}x{size[1]} is for classifiers of images and detectors, and the task is "
                    f"{type(parts.task).__name__}; leave --size out."
                )
            options = {} if size is None else {"size": size}
            return planner(parts.model.float().eval().requires_grad_(False), parts.task, **options)
    if isinstance(parts.task, CnnDetection):
        raise UserError(
            f"{type(parts.model).__name__} of torchvision cannot be exported, because its number of detections depends "
            "on the image (NMS); use predict.py or task.predict, or export model.net by torchvision's own means."
        )
    supported = ", ".join(task_class.__name__ for task_class in PLANNERS)
    raise UserError(f"The task {type(parts.task).__name__} cannot be exported; only {supported} can.")


def description(plan: Plan, formats: Sequence[Format], comparisons: Sequence[tuple[str, Comparison]]) -> dict[str, Any]:
    """Make the content of model.json: metadata, permitted sizes, graphs, comparisons and the versions of packages.

    The keys "checkpoint", "weights" and "files" are added by `export`.
    """
    content: dict[str, Any] = {"format": whole_folder.FORMAT, **plan.metadata}
    if plan.notes:
        content["notes"] = list(plan.notes)
    graph_formats = [form for form in graphs.ENDINGS if form in formats]
    content["sizes"] = {name: dimension.description for name, dimension in plan.dimensions.items()}
    content["graphs"] = {
        graph.name: {
            "files": {form: f"{graph.name}{graphs.ENDINGS[form]}" for form in graph_formats},
            "inputs": {
                name: {"type": str(tensor.dtype).removeprefix("torch."), "shape": graph.shapes[name]}
                for name, tensor in graph.inputs.items()
            },
            "outputs": graph.outputs,
        }
        for graph in (plan.graphs if graph_formats else ())
    }
    content["compared"] = {
        "rows": [
            {
                "file": name,
                "what": row.inputs,
                "output": row.output,
                "difference": row.difference,
                "limit": LIMITS[name],
            }
            for name, row in comparisons
        ],
    }
    packages = dict.fromkeys(["torch", *(package for form in formats for package in PACKAGES[form])])
    content["versions"] = {package: metadata.version(package) for package in packages}
    return content


def _require_packages(formats: Sequence[Format]) -> None:
    """Raise UserError if a package that a requested format needs is missing."""
    for form in formats:
        if missing := next((name for name in PACKAGES[form] if not util.find_spec(name)), None):
            extras = "export,openvino" if missing == "openvino" else "export"
            source = missing if missing == "ctranslate2" else f'"triptych[{extras}]"'
            raise UserError(
                f"--format {form} needs {missing}, which is not installed: pip install {source}, or give "
                "--format torch."
            )


def _formats(text: str) -> list[Format]:
    formats: list[Any] = [form for form in PACKAGES if form in text.split(",")]
    if len(formats) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text}: expected some of {', '.join(PACKAGES)}, separated by commas")
    return formats


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text}: expected the height and the width in pixels, such as 224x224")
    return int(height), int(width)


def _size_hint(plan: Plan) -> str:
    """The end of a sentence on different outputs: which option avoids them, if the graph accepts images of any size."""
    if "height" not in plan.dimensions:
        return ""
    height, width = plan.metadata["preprocessing"].get("image_size", ("H", "W"))
    return f"; --size {height}x{width} exports a graph for images of one size alone"


def _options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    summary, _, rest = str(__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        usage="%(prog)s checkpoint=FILE [key=value ...] [--output FOLDER] [--format LIST] [--size HxW]",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="the folder to write (default: the checkpoint's name and .export)"
    )
    parser.add_argument(
        "--format",
        type=_formats,
        default="torch,onnx",
        help=f"some of {', '.join(PACKAGES)} (default: torch,onnx)",
    )
    parser.add_argument(
        "--size",
        type=_size,
        metavar="HxW",
        help="the only height and width of images, in pixels, that the graph accepts (default: any)",
    )
    return parser.parse_known_args(arguments)


if __name__ == "__main__":
    start.script(main)
