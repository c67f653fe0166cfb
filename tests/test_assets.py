"""What travels with the package."""

import json
import pathlib
import re
import runpy

import pytest

import jstream
from jstream.config import TrainConfig, from_dict

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.smoke
def test_the_bundled_model_is_of_the_config_that_trains_it():
    config = from_dict(TrainConfig, runpy.run_path(str(REPOSITORY / "configs/tiny.py"))["get_config"]().to_dict())
    model = jstream.load()
    assert model.config == config.model
    assert model.protocol.config == config.protocol


def test_the_bundled_files_are_small():
    sizes = {path: path.stat().st_size for path in jstream.BUNDLED.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 16 * 2**20, sizes


def test_the_clip_is_of_another_series_than_the_training_videos():
    clip = json.loads((jstream.BUNDLED / "clip.json").read_text())
    config = runpy.run_path(str(REPOSITORY / "configs/tiny.py"))["get_config"]()
    assert re.search(r"seed (\d+)", clip["source"])[1] != str(config.seed)  # type: ignore[index]
    with jstream.open_video(jstream.BUNDLED / "clip.mp4") as video:
        times = [frame.time for frame in video]
    assert times == [float(second) for second in range(52)]
