"""The records of a job through Apache Beam, on whatever its runners run: the extra `beam`.

The pipeline carries indices; its workers open the annotations, the videos and the cache for themselves, so all of them
see these under the same paths, and have the key in their environment. Where locks do not reach from one machine to
another, two equal requests of one moment may be paid twice; later ones are not.
"""

import logging
import os
import pathlib
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import apache_beam  # type: ignore
from apache_beam.options.pipeline_options import PipelineOptions  # type: ignore

from jstream.data.synthesis.job import Job, Maker
from jstream.data.synthesis.llm import LLMError


class _Lines(apache_beam.DoFn):
    """Index to line; a client for each copy, so `requests_a_minute` holds for each of them alone."""

    def __init__(self, job: Job):
        self.job = job

    def setup(self):
        self.maker = Maker(self.job)

    def process(self, index: int):
        yield self.maker.line(index).rstrip("\n")


def lines(job: Job, indices: Sequence[int], options: str) -> Iterator[str]:
    """Runs the pipeline to its end, then yields the lines, in any order.

    Args:
        options: of Beam, as on a command line.

    Raises:
        LLMError: the pipeline failed; answers that were had are in the cache.
    """
    if not indices:
        return
    logging.getLogger("apache_beam").setLevel("CRITICAL")  # what fails raises
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{os.path.basename(job.out)}.", dir=os.path.dirname(job.out) or "."))
    try:
        try:
            with apache_beam.Pipeline(options=PipelineOptions(shlex.split(options))) as pipeline:
                made = pipeline | apache_beam.Create(list(indices)) | apache_beam.Reshuffle()
                made = made | apache_beam.ParDo(_Lines(job)).with_output_types(str)
                _ = made | apache_beam.io.WriteToText(str(folder / "lines"))
        except Exception as error:  # each runner has its own
            raise LLMError(f"the pipeline failed: {' '.join(str(error).split())[-500:]}") from None
        for shard in sorted(folder.glob("lines-*")):
            with shard.open(encoding="utf-8") as file:
                yield from file
    finally:
        shutil.rmtree(folder)
