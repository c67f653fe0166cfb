"""Frozen configurations: strict at the edge, the same after a trip through JSON."""

import dataclasses
import json
import pathlib
import runpy

import pytest

from jstream.config import (
    ConfigError,
    DecoderConfig,
    ModelConfig,
    ObjectiveConfig,
    ProtocolConfig,
    SiglipConfig,
    StageConfig,
    TrainConfig,
    from_dict,
    to_dict,
)

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TRAIN = TrainConfig(
    model=ModelConfig(
        SiglipConfig(image_size=32, patch_size=8, pooled_token=False),
        DecoderConfig(head_dim=16, mrope_section=(2, 3, 3), qkv_bias=True),
    ),
    protocol=ProtocolConfig(system="Watch. 🦙\n"),
    stages=(
        StageConfig(steps=10, rows=2, frames=4, tokens=0, objective=ObjectiveConfig(replies=0.0, words=1.0)),
        StageConfig(steps=5, rows=1, frames=20, tokens=640, weights=(("narration", 0.75), ("tsqa", 0.25))),
    ),
    workers=0,
)


def error_of(cls, values):
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, values)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.smoke
@pytest.mark.parametrize("config", [TRAIN, TRAIN.model, TRAIN.stages[1], SiglipConfig(), ProtocolConfig()])
def test_a_config_is_the_same_after_a_trip_through_json(config):
    read = from_dict(type(config), json.loads(json.dumps(to_dict(config))))
    assert read == config
    assert hash(read) == hash(config)  # a static argument of a jitted step: the same config must not compile again


def test_what_is_left_out_takes_its_default():
    assert from_dict(ModelConfig, {"vision": {"width": 64}}) == ModelConfig(vision=SiglipConfig(width=64))
    assert from_dict(StageConfig, {"steps": 1, "rows": 2, "frames": 30, "tokens": 4}) == StageConfig(1, 2, 30, 4)


def test_a_dataclass_may_stand_where_an_object_is_expected():
    assert from_dict(ModelConfig, {"vision": SiglipConfig(width=64)}).vision.width == 64


def test_a_whole_number_may_stand_for_a_float():
    theta = from_dict(DecoderConfig, {"rope_theta": 10_000}).rope_theta
    assert theta == 10_000.0 and isinstance(theta, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"visoin": {}}, "ModelConfig: unknown key 'visoin'; did you mean 'vision'?"),
        ({"vision": {"patchsize": 8}}, "ModelConfig.vision: unknown key 'patchsize'; did you mean 'patch_size'?"),
        (
            {"decoder": {"num_kv_head": 8}},
            "ModelConfig.decoder: unknown key 'num_kv_head'; did you mean 'num_kv_heads'?",
        ),
        ({"zzz": 1}, "ModelConfig: unknown key 'zzz'; known: vision, decoder"),
    ],
)
def test_an_unknown_key_names_the_nearest_one(values, message):
    assert error_of(ModelConfig, values) == message


@pytest.mark.parametrize(
    ("values", "where", "expected"),
    [
        ({"width": "64"}, "SiglipConfig.width", "int"),
        ({"width": 64.0}, "SiglipConfig.width", "int"),
        ({"width": True}, "SiglipConfig.width", "int"),
        ({"width": None}, "SiglipConfig.width", "int"),
        ({"norm_eps": "small"}, "SiglipConfig.norm_eps", "float"),
        ({"norm_eps": True}, "SiglipConfig.norm_eps", "float"),
        ({"pooled_token": 1}, "SiglipConfig.pooled_token", "bool"),
        ({"pooled_token": "yes"}, "SiglipConfig.pooled_token", "bool"),
    ],
)
def test_a_value_of_another_type_is_an_error(values, where, expected):
    assert error_of(SiglipConfig, values) == f"{where}: expected {expected}, found {next(iter(values.values()))!r}"


def test_a_wrong_value_deep_inside_is_named_with_its_path():
    stage = {"steps": 1, "rows": 1, "frames": 20, "tokens": 1}
    train = {"model": {}, "protocol": {}, "stages": [stage, stage | {"objective": {"gamma": "2"}}]}
    assert error_of(TrainConfig, train) == "TrainConfig.stages[1].objective.gamma: expected float, found '2'"
    train["stages"] = [stage | {"weights": [["narration", 1.0], ["tsqa"]]}]
    assert error_of(TrainConfig, train) == "TrainConfig.stages[0].weights[1]: expected 2 values, found ['tsqa']"
    assert "expected a list, found 'x'" in error_of(TrainConfig, train | {"stages": "x"})
    assert "expected an object, found int" in error_of(TrainConfig, train | {"model": 3})


def test_a_missing_key_is_named():
    assert error_of(StageConfig, {"steps": 1, "rows": 2, "tokens": 4}) == "StageConfig: missing key 'frames'"
    assert error_of(TrainConfig, {"model": {}}) == "TrainConfig: missing key 'protocol'"
    for values in ([], None, "tiny"):
        assert "StageConfig: expected an object" in error_of(StageConfig, values)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (SiglipConfig, {"image_size": 100, "patch_size": 16}),
        (SiglipConfig, {"image_size": 42, "patch_size": 14, "stem_width": 8}),
        (DecoderConfig, {"num_heads": 6, "num_kv_heads": 4}),
        (DecoderConfig, {"head_dim": 128, "mrope_section": [16, 24, 23]}),
    ],
)
def test_numbers_that_do_not_fit_together_are_an_error(cls, values):
    message = error_of(cls, values)
    assert "expected" in message and "found" in message


def test_a_frame_has_its_grid_of_tokens_and_perhaps_the_pooled_one():
    assert SiglipConfig(grid=3, pooled_token=True).tokens_per_frame == 10
    assert SiglipConfig(grid=3, pooled_token=False).tokens_per_frame == 9
    assert SiglipConfig(grid=0, pooled_token=True).tokens_per_frame == 1


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SiglipConfig().width = 3


def test_objectives_are_compared_from_one_base_under_one_recipe():
    get = runpy.run_path(str(REPOSITORY / "configs/ablation.py"))["get_config"]
    of = lambda name: from_dict(TrainConfig, get(name).to_dict())
    names = ("ce", "fixed", "focal", "focal_released", "class_balanced")
    objectives = {name: of(name).stages[0].objective for name in names}
    assert {name: objective.states for name, objective in objectives.items()} == {name: name for name in names}
    same = [dataclasses.replace(of(name).stages[0], objective=objectives["ce"]) for name in names]
    assert same == [same[0]] * len(names)
    assert of("base").stages[0].objective.fixed == (0.0, 0.0, 0.0)  # never told when to speak
    with pytest.raises(ConfigError, match="expected base, ce, fixed"):
        get("focus")


def test_the_tiny_configuration_builds():
    made = runpy.run_path(str(REPOSITORY / "configs/tiny.py"))["get_config"]()
    config = from_dict(TrainConfig, made.to_dict(), "config")
    assert config.model.decoder.tie_embeddings and config.protocol.frame_token == "<|frame|>"
    assert all(stage.steps > 0 for stage in config.stages)
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
