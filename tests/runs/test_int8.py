"""The bundled model with int8 weights: how far off it is, and that it says so."""

import re

import jax
import numpy as np
from test_convert import convert

import jstream


def test_int8_weights_are_close_and_say_how_close(tmp_path):
    smaller = tmp_path / "int8"
    made = convert(f"--source={jstream.BUNDLED}", f"--target={smaller}", "--format=orbax", "--int8")
    assert made.returncode == 0, made.stderr
    told = re.search(r"int8 weights: logits ([\d.]+) % off, .* at ([\d.]+) % of (\d+) positions", made.stdout)
    assert told and 0 < float(told[1]) < 5 and float(told[2]) > 95 and int(told[3]) > 200, made.stdout

    whole, model = jstream.load(), jstream.load(smaller)
    assert model.config.decoder.int8 and model.mesh is None
    kernel = model.params["decoder"]["layers_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == np.int8 and abs(np.asarray(kernel, np.int32)).max() == 127
    stored = lambda params: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params["decoder"]))
    assert stored(model.params) < 0.35 * stored(whole.params)  # f32 in memory; the embedding stays
    frame = jstream.Frame(0.0, np.full((96, 96, 3), 128, np.uint8))
    one, two = ([*jstream.Session(m, capacity=1024).see(frame).probs.values()] for m in (whole, model))
    np.testing.assert_allclose(one, two, atol=0.05)
