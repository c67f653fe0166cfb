"""The launcher that compares objectives: what is left to do, and the table of what came out."""

import json
import pathlib
import runpy

import pytest

launcher = runpy.run_path(str(pathlib.Path(__file__).resolve().parent.parent / "launch" / "ablation.py"))


def test_what_is_done_is_not_done_again(tmp_path):
    left = lambda: launcher["missing"](tmp_path, ["ce", "focal"], ["1", "2"], 4)
    assert len(left()) == 1 + 2 * 2 * 2 and "configs/ablation.py:base" in left()[0][3]
    for made in ("base/model", "ce-1/model", "ce-1/scores/report.json", "focal-1/model"):
        (tmp_path / made).mkdir(parents=True)
    assert f"--checkpoint={tmp_path / 'focal-1' / 'model'}" in left()[0] and len(left()) == 5
    assert f"--config.weights.checkpoint={tmp_path / 'base' / 'model'}" in left()[1] and "--config.seed=2" in left()[1]


def test_the_table_has_the_mean_and_the_spread_over_seeds(tmp_path):
    for seed, value in (("1", 0.25), ("2", 0.5), ("3", None)):
        folder = tmp_path / f"ce-{seed}" / "scores"
        folder.mkdir(parents=True)
        metrics = dict.fromkeys(launcher["MEASURED"], value) | {"forward_miou": None}
        (folder / "report.json").write_text(json.dumps({"metrics": metrics}))
    found = launcher["results"](tmp_path, ["ce"], ["1", "2", "3"])
    lines = list(launcher["table"](found))
    assert lines[0] == "| | ce |" and "| counting | 0.375 (0.250 – 0.500) |" in lines
    assert "| forward grounding, mIoU | – |" in lines


@pytest.mark.parametrize("option", ["--objectives=ce,focus", "--seeds=one", "--num_videos=0"])
def test_what_makes_no_sense_is_refused(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as refused:
        launcher["parse"]([f"--out={tmp_path}", option])
    assert refused.value.code == 2 and "expected --" in capsys.readouterr().err
