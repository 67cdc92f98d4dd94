"""bench sharing: what samples and beams of one request save, counted on the engine."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from paged_infer.bench.scheduling.sharing import measure_sharing
from paged_infer.cli import app


def test_samples_save_their_prompt_and_beams_more(make_llm) -> None:
    llm = make_llm(enable_prefix_caching=False, block_size=4)
    prompts = [list(range(2, 22))]  # 5 full blocks
    two, four, two_beams, four_beams = measure_sharing(llm, prompts, [2, 4], max_tokens=8)
    # While decoding, 2 samples hold 5 shared blocks and 1 or 2 each: at least 5 of 14, at most 5 of 10 are spared.
    assert 5 / 14 <= two.saved <= 1 / 2
    assert two.saved < four.saved < 3 / 4
    assert two_beams.saved >= two.saved and four_beams.saved >= four.saved
    assert llm.stats()["free_blocks"] == llm.stats()["num_blocks"]


def test_the_command_prints_a_row_for_each_width_beside_the_papers(tmp_path) -> None:
    options = ["--width", "2", "--num-requests", "2", "--max-tokens", "6", "--figures", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", "sharing", *options])
    assert result.exit_code == 0, result.output
    assert "2 samples" in result.output and "37.6 to 55.2 %" in result.output
    report = json.loads((tmp_path / "bench-sharing.json").read_text())
    assert [(saving["kind"], saving["width"]) for saving in report["savings"]] == [("samples", 2), ("beams", 2)]


@pytest.mark.parametrize("option", [["--width", "1"], ["--width", "300", "--max-tokens", "2"]])
def test_a_width_that_cannot_be_is_refused(option) -> None:
    result = CliRunner().invoke(app, ["bench", "sharing", *option])
    assert result.exit_code == 2
