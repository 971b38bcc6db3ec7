"""The rows of GPT-2 at toy sizes: different work is refused, and amounts are those of the work."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from scripts import benchmark
from scripts.benchmarks import gpt, gpt_peers, report
from scripts.benchmarks.timing import MismatchError, Setting


def run(tmp_path: Path, rows: str) -> tuple[int, Path]:
    out = tmp_path / "report.json"
    tiny = ["--tiny", "--device", "cpu", "--warm-up", "0", "--rounds", "1", "--out", str(out)]
    return benchmark.main(["gpt", *tiny, "--rows", rows]), out


def setting(tmp_path: Path) -> Setting:
    return Setting(device=torch.device("cpu"), tiny=True, compile=False, images=None, scratch=tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("equal_peaks")
def test_every_row_runs_and_prints_its_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(tmp_path, ",".join(gpt.ROWS))
    printed, result = capsys.readouterr().out, json.loads(out.read_text())
    assert code == 0 and report.text(result) in printed
    one, many, train = result["rows"]
    assert [row["row"] for row in (one, many, train)] == [
        "greedy generation 1x6, 8 new tokens",
        "greedy generation 4x6, 8 new tokens",
        "training step 2x16",
    ]
    assert "ours fp32 4 of 4 texts equal" in many["agreement"]
    assert "transformers fp32 gradient" in train["agreement"] and "transformers fp32 update" in train["agreement"]
    for row, count in ((one, 8), (many, 4 * 8)):
        assert {ratio["one"] for ratio in row["ratios"]} == {"ours fp32", "ours bf16"}
        assert all(len(ratio["among"]) == 2 for ratio in row["ratios"])
        assert row["amounts"]["ours bf16"]["at_once"] == count
    assert train["amounts"]["transformers fp32"]["at_once"] == 2 * 16


@torch.no_grad()
def test_generated_texts_have_many_different_tokens_and_depend_on_their_prompts(tmp_path: Path) -> None:
    """Otherwise equal texts would say little about equal models."""
    texts = gpt.many(setting(tmp_path)).contenders["ours fp32"]()
    assert len({tuple(text) for text in texts}) == 4 and len({token for text in texts for token in text}) > 8


@pytest.mark.parametrize("name", ["decoder.blocks.1.attention.in_proj.bias", "decoder.norm.weight", "embedding.weight"])
def test_a_peer_with_one_other_tensor_is_not_timed(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    build_peer = gpt_peers.peer

    def altered(model: Any, recipe: dict[str, Any]) -> nn.Module:
        theirs = build_peer(model, recipe)
        tensor = dict(theirs.named_parameters())[gpt_peers.NAMES.to_theirs(name)]
        with torch.no_grad():
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        return theirs

    monkeypatch.setattr(gpt_peers, "peer", altered)
    with pytest.raises(MismatchError):
        gpt.many(setting(tmp_path)).check()
    with pytest.raises(MismatchError):
        gpt.train(setting(tmp_path)).check()
