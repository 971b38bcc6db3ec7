"""The benchmark of joined gradients runs, and refuses to time what is not the same work."""

import contextlib
import io
from pathlib import Path

import pytest
from ranks import each

from common.machine import distributed
from scripts.benchmarks import joining
from scripts.benchmarks.timing import Disagreement

TINY = ["--tiny", "--models", "vit_s16", "--rounds", "2", "--warm-up", "0", "--device", "cpu"]


def run(defect: bool) -> tuple[int | str, str]:
    """The exit code, or why nothing was timed; and what was printed."""

    if defect:
        distributed.join_gradients = lambda parameters: None
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            return joining.main(TINY), printed.getvalue()
        except Disagreement as error:
            return str(error), printed.getvalue()


@pytest.mark.slow
def test_ranks_time_both_ways_and_the_first_prints_a_table(tmp_path: Path) -> None:
    (code, table), (other, nothing) = each(tmp_path, 2, run, False)
    assert code == other == 0 and not nothing
    assert table.count("vit_s16") == 4 and "gradients" in table, "an agreement and three ratios"


@pytest.mark.slow
def test_gradients_that_were_not_joined_are_not_timed(tmp_path: Path) -> None:
    for reason, printed in each(tmp_path, 2, run, True):
        assert "not the same work" in reason and not printed


def test_one_process_has_nothing_to_join(capsys: pytest.CaptureFixture[str]) -> None:
    assert joining.main(["--device", "cpu"]) == 2
    assert "torchrun" in capsys.readouterr().err
