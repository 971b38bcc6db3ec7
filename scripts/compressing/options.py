"""The arguments of compress.py: its own keys, and overrides of the config."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from common.config.check import did_you_mean
from common.errors import UserError
from common.train.sparsity import MAX_ZEROS

T = TypeVar("T")
STEPS = ("prune.heads", "prune.neurons", "rank", "prune.magnitude")  # keys that make a model smaller
MAKING = (*STEPS, "prune.ranking", "finetune", "distil", "samples")  # keys that determine the compressed checkpoint
KEYS = (*MAKING, "output", "quantize", "resume", "run_dir")
REPORT_KEYS = ("checkpoint", "variants", "precisions")
SAMPLES = 256
RANKINGS = ("estimate", "loss")  # of neurons; the first is the default
SEQUENCE = "sequence"  # the kind of distillation that trains on the translations of the dense model
FILE = "compressed.pt"  # the compressed checkpoint, in the output folder


@dataclass(frozen=True)
class Options:
    """The script's own arguments, and the overrides of the config."""

    checkpoints: list[Path]  # one, or for the report several runs of the dense model
    overrides: list[str]
    making: dict[str, str]  # those of the keys in MAKING that are given, and their values
    heads: float | None
    neurons: float | None
    ranking: str  # of neurons: "estimate" or "loss"
    magnitude: float | None
    rank: int | float | None
    steps: int | None  # of fine-tuning
    distil: str | None
    samples: int
    quantizes: bool
    output: Path | None
    variants: list[Path]
    precisions: list[str]
    resumes: bool  # continue fine-tuning that was stopped

    @property
    def compresses(self) -> bool:
        """Whether a key makes the model smaller."""
        return any(value is not None for value in (self.heads, self.neurons, self.magnitude, self.rank))

    @property
    def folder(self) -> Path:
        """The folder of the compressed checkpoint, or of the report alone."""
        return self.output or Path("compressed" if self.compresses or self.translates else "report")

    @property
    def run_folder(self) -> Path:
        """The folder of the run of fine-tuning."""
        return self.folder / "finetune"

    @property
    def translates(self) -> bool:
        """Whether the first checkpoint translates its training sources."""
        return self.distil == SEQUENCE


def read_options(words: Sequence[str], reports: bool) -> Options:
    """Split the command line into the script's own keys and overrides of the config; raises UserError for a mistake.

    `reports` is whether there is the flag --report.
    """
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in words]
    own = {key: value for key, value in pairs if key in (*KEYS, *REPORT_KEYS)}
    unknown = next((key for key, _ in pairs if key.startswith("prune") and key not in KEYS), None)
    if unknown:
        raise UserError(f"{unknown} is not a key of compress.py{did_you_mean(unknown, KEYS)}")
    if own.get("quantize", "int8") != "int8":
        raise UserError(f"quantize={own['quantize']}: expected quantize=int8; see --help.")
    if own.get("resume", "null") not in ("auto", "null"):
        raise UserError(f"resume={own['resume']}: expected resume=auto; see --help.")
    checkpoints = _paths(own.get("checkpoint", ""))
    options = Options(
        checkpoints=checkpoints,
        overrides=[word for word in words if word.partition("=")[0] not in (*KEYS, *REPORT_KEYS)],
        making={key: own[key] for key in MAKING if key in own},
        heads=_optional(own, "prune.heads", _fraction),
        neurons=_optional(own, "prune.neurons", _fraction),
        ranking=own.get("prune.ranking", RANKINGS[0]),
        magnitude=_optional(own, "prune.magnitude", _fraction),
        rank=_optional(own, "rank", _rank),
        steps=_optional(own, "finetune", _count),
        distil=_optional(own, "distil", _kind),
        samples=_count("samples", own.get("samples", str(SAMPLES))),
        quantizes="quantize" in own,
        output=Path(own["output"]) if own.get("output") else None,
        variants=_paths(own.get("variants", "")),
        precisions=[part for part in own.get("precisions", "").split(",") if part],
        resumes=own.get("resume") == "auto",
    )
    _refuse_mistakes(options, own, reports)
    return options


def _refuse_mistakes(options: Options, own: dict[str, str], reports: bool) -> None:
    """Raise UserError for arguments that do not fit together."""
    if not options.checkpoints:
        raise UserError("compress.py needs checkpoint=FILE; see --help.")
    if not reports and (len(options.checkpoints) > 1 or {"variants", "precisions"} & {*own}):
        raise UserError("several checkpoints, variants= and precisions= are for the report; add --report.")
    if options.magnitude is not None and options.magnitude > MAX_ZEROS:
        raise UserError(
            f"prune.magnitude={options.magnitude:g}: each matrix has at most {MAX_ZEROS:g} zeros; give at most that."
        )
    if options.ranking not in RANKINGS:
        raise UserError(f"prune.ranking={options.ranking}: expected {' or '.join(RANKINGS)}.")
    if "prune.ranking" in own and options.neurons is None:
        raise UserError(f"prune.ranking={options.ranking} ranks neurons; give prune.neurons=, too.")
    writes_text = options.translates and not options.quantizes  # distil=sequence alone
    for key in ("finetune", "distil"):
        if key in own and not options.compresses and not (key == "distil" and writes_text):
            raise UserError(f"{key}= needs a key that makes the model smaller: {', '.join(STEPS)}.")
    if not options.compresses and not options.quantizes and not options.translates and not reports:
        raise UserError(
            f"compress.py needs a key that makes the model smaller ({', '.join(STEPS)}), quantize=int8, or --report."
        )
    if options.resumes and options.steps is None:
        raise UserError(
            "resume=auto continues fine-tuning; give finetune=STEPS and the other keys of the first command."
        )
    if own.get("run_dir", "null") != "null" and Path(own["run_dir"]).resolve() != options.run_folder.resolve():
        raise UserError(f"run_dir={own['run_dir']}: fine-tuning runs in {options.run_folder}; choose it by output=.")
    if "trainer.precision=int8" in options.overrides and (options.compresses or options.translates):
        raise UserError(
            "trainer.precision=int8: models are compressed in fp32; add quantize=int8 to calibrate the result."
        )
    if reports and options.output and options.quantizes and not options.compresses:
        raise UserError(
            "output= is the calibrated file, so there is no folder for --report; give the report its own command, with "
            "variants= and precisions=fp32,int8."
        )
    if options.distil and options.steps is None and (options.compresses or not options.translates):
        raise UserError(f"distil={options.distil} is for fine-tuning; give finetune=STEPS, too.")


def _paths(text: str) -> list[Path]:
    """The files that a text names, separated by commas; a path that exists may itself hold commas."""
    whole = Path(text).expanduser()
    return [whole] if text and whole.exists() else [Path(part).expanduser() for part in text.split(",") if part]


def _optional(own: dict[str, str], key: str, read: Callable[[str, str], T]) -> T | None:
    return read(key, own[key]) if key in own and own[key] != "null" else None


def _fraction(key: str, text: str) -> float:
    if not re.fullmatch(r"\d*\.?\d+(e-\d+)?", text) or not 0 < float(text) < 1:
        raise UserError(f"{key}={text}: expected a fraction above 0 and below 1, such as {key}=0.25.")
    return float(text)


def _rank(key: str, text: str) -> int | float:
    if re.fullmatch(r"[1-9]\d{0,8}", text):
        return int(text)
    if re.fullmatch(r"0?\.\d+", text) and float(text) > 0:
        return float(text)
    raise UserError(f"{key}={text}: expected a whole number from 1, or a fraction above 0 and below 1, such as 0.95.")


def _count(key: str, text: str) -> int:
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise UserError(f"{key}={text}: expected a whole number from 1.")
    return int(text)


def _kind(key: str, text: str) -> str:
    if text not in ("soft", "hard", SEQUENCE):
        raise UserError(f"{key}={text}: expected soft, hard or {SEQUENCE}.")
    return text
