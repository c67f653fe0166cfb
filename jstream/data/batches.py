"""Batches of rows, as grain makes them in worker processes: shuffled, without end, and each a function of its number.

Because the number of a batch says all about it, a run goes on at the exact next batch from its step alone, on however
many processes and workers: every process makes just the rows that lie on its devices.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

ENDLESS = 1 << 62


class _OwnRows:
    """The rows of all batches that one process makes: entry j is row `own[j % m]` of batch `first + j // m`."""

    def __init__(self, rows: Any, batch: int, own: Sequence[int], first: int):
        self.rows, self.batch, self.own, self.first = rows, batch, own, first

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        number, place = divmod(index, len(self.own))
        return self.rows[(self.first + number) * self.batch + self.own[place]]


def batches(
    rows: Sequence, batch: int, seed: int, workers: int, first: int = 0, own: Sequence[int] | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """The batches from number `first` on, over and over through the rows, in another order each time.

    Args:
        rows: made in worker processes when `workers` > 0, else in this one.
        batch: B, over all processes.
        seed: of the order of rows.
        own: the rows of each batch that this process makes, by their place in it; all by default.

    Returns:
        An iterator that yields what `own` says of each batch; it has a `close`.
    """
    own = range(batch) if own is None else own
    shuffled = grain.MapDataset.source(rows).shuffle(seed).repeat()
    reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(_OwnRows(shuffled, batch, own, first)).batch(len(own)).to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads absl flags of its own, also where no command has parsed any
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(dataset)


def _end_with_parent(index: int, count: int) -> None:
    """Lets a worker end when the process that reads from it is gone, killed ones included."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the reader, which then closes its workers
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
