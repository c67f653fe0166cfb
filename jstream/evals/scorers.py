"""The table of scorers: benchmarks that are scored from predictions, without a model."""

from types import ModuleType

from jstream.evals import (
    charades_sta,
    coin,
    dense_captions,
    ovo_bench,
    qvhighlights,
    streamingbench,
    streamo_bench,
    timing,
)

SCORERS: dict[str, ModuleType] = {
    "ovo_bench": ovo_bench,
    "qvhighlights": qvhighlights,
    "streamingbench": streamingbench,
    "streamo_bench": streamo_bench,
    "timing": timing,
    "charades_sta": charades_sta,
    "coin": coin,
    "dense_captions": dense_captions,
}
