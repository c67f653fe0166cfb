"""A whole run through the commands, from features that were computed once, beside one from the videos."""

import json

import numpy as np
import pytest
from test_features import RUN, STAGE, WORLDS, command, config, videos  # noqa: F401  (fixtures)
from test_training import finish, protocol  # noqa: F401  (a fixture)

import jstream
from jstream.weights.hf import flat


def test_a_run_from_features_is_the_run_from_videos(config, videos, tmp_path):  # noqa: F811
    """Losses, validations and the model at last; rows are made by a worker."""
    model, annotations = config.weights.checkpoint, videos / "d.jsonl"
    made = command("features", model, f"--annotations={annotations}", f"--out={tmp_path / 'seen'}", "--dtype=float32")
    assert "3 videos, 6 annotations; 0 videos skipped" in finish(made)
    runs = {}
    for name, path in (("videos", annotations), ("features", tmp_path / "seen")):
        workdir = tmp_path / name
        data = f"--config.dialogues={path}", f"--config.validation_dialogues={path}"
        # without adapters: those of a tower with a stem have no published format to be written in
        finish(command("train", model, f"--workdir={workdir}", "--config.lora.rank=0", *data))
        records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        told = [{key: x for key, x in record.items() if "second" not in key and key != "waiting"} for record in records]
        runs[name] = told, flat(jstream.load(workdir / "model").params)
    (told, params), (other, others) = runs["features"], runs["videos"]
    assert len(told) == STAGE.steps and "validation/ppl" in told[-1] and told[-1]["loss"] < told[0]["loss"]
    for own, its in zip(told, other, strict=True):
        assert own == pytest.approx(its, abs=2e-6)
    for path, x in params.items():
        np.testing.assert_allclose(x, others[path], atol=1e-6, err_msg=path)
