"""Compute the final numbers of a run: evaluate test once, with the best checkpoint or the average of the last ones."""

import math
from collections.abc import Callable
from functools import partial

from common.errors import UserError
from common.files import checkpoint
from common.files.lines import naming
from common.files.log import Log
from common.files.retention import CheckpointFolder, LoadedCheckpoint
from common.machine import distributed
from common.task import Metric, Split
from common.train import averaging
from common.train.state import Run, describe, refuse_as_best, select_weights

Evaluation = Callable[[Split], tuple[dict[str, float], Metric]]  # evaluates the run's model with its current weights


def final_numbers(
    run: Run, folder: CheckpointFolder, log: Log, evaluate: Evaluation, averaged: int
) -> dict[str, float | str]:
    """Evaluate test once, with the weights that are best on val, and write the predictions on test.

    By default, the best checkpoint on val is tested. If `averaged` is above 0, the average of the last `averaged`
    checkpoints is tested instead if it is at least as good on val. Without a val split, the average is tested or, if
    there is none, the last checkpoint. If there is a val split but the goal never had a value on it, the last
    checkpoint is tested.

    Returns the goal's best value on val (if it has one) and all metrics of test (if there is a test split), by name. If
    `averaged` is above 0, the entry "weights" describes the weights that were tested.
    """
    goal = f"val/{run.task.goal.name}"
    ranked = [step for _, step in run.ranking]
    average, best = _average(run, folder, log, evaluate, averaged)
    # If the ranking is empty, best.pt is not used even if it exists: an earlier version wrote it for undefined scores.
    best_of_run = folder.best(ranked, log.warning, partial(refuse_as_best, run)) if ranked else None
    chosen = average or best_of_run or folder.latest(log.warning)
    assert chosen is not None, "the last step always writes a checkpoint"
    path, content = chosen
    if not average and ranked and ranked[0] not in (content["step"], 0):  # 0 is an unknown step, see state._ranking
        log.warning(f"The best checkpoint on val, of step {ranked[0]}, is missing; {path.name} is tested instead.")
    if best is None and run.data.count("val"):
        log.warning(f"No evaluation gave a value of {goal}; the last checkpoint, {path.name}, is tested.")
    distributed.load_state_dict(run.model, select_weights(content))
    numbers: dict[str, float | str] = {} if best is None else {goal: best}
    if averaged:
        numbers["weights"] = describe(path.relative_to(run.folder), content)
    if run.data.count("test"):
        scores, metric = evaluate("test")
        numbers = {**_log_test_numbers(run, log, scores), **numbers}
        if distributed.is_main():
            with naming(run.folder / "predictions"):
                metric.write(run.folder / "predictions")
    log.info(f"weights   {describe(path, content)}")
    return numbers


def warn_of_undefined(run: Run, log: Log, split: Split, score: float, effect: str) -> None:
    """Warn if the goal has no value on `split`; `effect` is the end of the warning, which states the consequence."""
    goal = run.task.goal
    if not goal.is_defined(score):
        log.warning(f"{split}/{goal.name} is {score:g} at step {run.step}, which is no value; {effect}.")


def _log_test_numbers(run: Run, log: Log, scores: dict[str, float]) -> dict[str, float]:
    """Log the metrics of test and return them by full names ("test/AP").

    Warns if there are no metrics, or if the goal has no value.
    """
    numbers = {f"test/{name}": number for name, number in scores.items()}
    if not numbers:
        log.warning("There are no test numbers, because the test data have no annotations.")
        return {}
    log.numbers(run.step, numbers)
    warn_of_undefined(run, log, "test", scores.get(run.task.goal.name, math.nan), "compare no model by it")
    return numbers


def _average(
    run: Run, folder: CheckpointFolder, log: Log, evaluate: Evaluation, averaged: int
) -> tuple[LoadedCheckpoint | None, float | None]:
    """Average the last checkpoints into average.pt, and compare its score on val with that of the best checkpoint.

    Returns two values: the path and content of average.pt, or None if another checkpoint is to be tested; and the
    goal's best value on val, or None if there is no value.
    """
    if not averaged or not _write_average(folder, log, averaged):
        return None, run.best
    content = checkpoint.load(folder.average())
    distributed.load_state_dict(run.model, select_weights(content))
    if not run.data.count("val"):
        return (folder.average(), content), None
    numbers, _ = evaluate("val")
    log.numbers(run.step, {f"average/{name}": number for name, number in numbers.items()})
    score = numbers.get(run.task.goal.name, math.nan)
    if score != run.best and not run.task.goal.better(score, run.best):  # `better` is false for an undefined score
        return None, run.best
    return (folder.average(), content), score


def _write_average(folder: CheckpointFolder, log: Log, averaged: int) -> bool:
    """Write average.pt; returns whether that succeeded. Warns if a file cannot be read, averaged or written."""
    written = False
    if distributed.is_main():
        try:
            checkpoint.save(folder.average(), averaging.average(folder.last(averaged)))
            written = True
        except (UserError, OSError) as error:
            log.warning(f"The last checkpoints were not averaged: {error}")
    return bool(distributed.broadcast(written))  # other ranks wait until the file is complete
