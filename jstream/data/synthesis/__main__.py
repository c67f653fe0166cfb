"""Makes streaming instruction data from annotations, with an LLM or a VLM behind an OpenAI-compatible endpoint.

    python -m jstream.data.synthesis --kind=live_chats --annotations=FILE \\
        --out=FILE.jsonl --llm=http://HOST:PORT/v1 --llm_model=NAME --workers=16
    python -m jstream.data.world --out=runs/world --num_videos=4   # to try it
    python -m jstream.data.synthesis --kind=live_chats --out=runs/chats.jsonl \\
        --annotations=runs/world/dialogues.jsonl \\
        --llm=http://localhost:8000/v1 --llm_model=NAME

The key is the environment's OPENAI_API_KEY. Stopped, it goes on where it was and pays for nothing again; what could not
be made is listed in FILE.skipped.jsonl.
"""

import json
import os

from absl import flags

from jstream import command
from jstream.config import ConfigError
from jstream.data.synthesis import job as jobs
from jstream.data.synthesis.llm import DEFAULT_OPTIONS, Endpoint
from jstream.data.synthesis.source import Looks

_KIND = flags.DEFINE_enum("kind", None, jobs.KINDS, "What to make.")
_ANNOTATIONS = flags.DEFINE_string("annotations", None, "A .json or .jsonl file, its videos beside it.")
_OUT = flags.DEFINE_string("out", None, "File to write, .jsonl.")
_LLM = flags.DEFINE_string("llm", None, "Endpoint, up to /v1: http://localhost:8000/v1.")
_LLM_MODEL = flags.DEFINE_string("llm_model", None, "As the endpoint names it; for pictures one that sees.")
_LLM_OPTIONS = flags.DEFINE_string(
    "llm_options", "{}", f"Of each request, JSON, over {json.dumps(DEFAULT_OPTIONS)}; null takes one out."
)
_CACHE = flags.DEFINE_string("cache", None, "Folder of answers; llm_cache beside --out by default.")
_WORKERS = flags.DEFINE_integer("workers", 4, "Requests at a time.", lower_bound=1, upper_bound=1024)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn, and of the requests.")
_RPM = flags.DEFINE_float("requests_a_minute", None, "At most; no limit by default.")
_RETRIES = flags.DEFINE_integer("retries", Endpoint.retries, "Of a request that fails in a way that may pass.")
_BACK_OFF = flags.DEFINE_float("back_off", Endpoint.back_off, "Seconds before the first retry, then doubled.")
_TIMEOUT = flags.DEFINE_float("timeout", Endpoint.timeout, "Seconds for one try.")
_PRICE_IN = flags.DEFINE_float("price_in", 0.0, "Of a million tokens of requests.", lower_bound=0.0)
_PRICE_OUT = flags.DEFINE_float("price_out", 0.0, "Of a million tokens of answers.", lower_bound=0.0)
_MAX_SECONDS = flags.DEFINE_integer("max_seconds", Looks.max_seconds, "Of a video that is looked at.")
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", Looks.max_pixels, "Of a picture; larger ones are scaled down.")
_QUALITY = flags.DEFINE_integer("quality", Looks.quality, "Of the JPEG, 1 to 95.")
_IOU = flags.DEFINE_float("iou", jobs.Job.iou, "Least, of a caption's span and where it was found.")
_FAULTS = flags.DEFINE_float("faults", jobs.Job.faults, "Share of chats with an answer that is put right later.")
_MAX_FRAMES = flags.DEFINE_integer("max_frames", jobs.Job.max_frames, "Of a chat, two a second.")
_BEAM = flags.DEFINE_string("beam", None, "Options of an Apache Beam pipeline: --runner=…")


def main() -> None:
    needed = {"kind": _KIND, "annotations": _ANNOTATIONS, "out": _OUT, "llm": _LLM, "llm_model": _LLM_MODEL}
    kind, annotations, out, url, model = (flag.value or "" for flag in needed.values())
    if missing := [f"--{name}=…" for name, flag in needed.items() if not flag.value]:
        raise ConfigError(f"expected {' '.join(missing)}; see `python -m jstream.data.synthesis --help`")
    try:
        options = json.loads(_LLM_OPTIONS.value)
    except (ValueError, RecursionError):
        options = None
    if not isinstance(options, dict):
        raise ConfigError(f"llm_options: expected a JSON object, found {_LLM_OPTIONS.value!r}")
    endpoint = Endpoint(
        url,
        model,
        _CACHE.value or os.path.join(os.path.dirname(out), "llm_cache"),
        options,
        _RPM.value,
        _RETRIES.value,
        _BACK_OFF.value,
        _TIMEOUT.value,
    )
    looks = Looks(_MAX_SECONDS.value, _MAX_PIXELS.value, _QUALITY.value)
    chosen = _SEED.value, looks, _IOU.value, _FAULTS.value, _MAX_FRAMES.value
    job = jobs.Job(kind, annotations, out, endpoint, *chosen)
    outcome = jobs.run(job, _WORKERS.value, _BEAM.value)
    spent = outcome.spent
    paid, saved = spent.cost(_PRICE_IN.value, _PRICE_OUT.value)
    print(f"{out}: {outcome.made} made of {outcome.records} records; {outcome.skipped} reasons why something was not")
    print(f"paid for: {spent.paid} answers, {spent.tokens_in} tokens in, {spent.tokens_out} out: {paid:.4f}")
    print(f"cached: {spent.cached} answers, {spent.cached_in} tokens in, {spent.cached_out} out: {saved:.4f} saved")
    print(f"failed tries: {spent.failures}")


if __name__ == "__main__":
    command.run(main)
