"""Alerts: replies posted to webhooks, each at least once, however often a receiver fails and the server is killed.

    post → writer thread → the spool's folder → workers → receiver, again and again until it answers 2xx

`post` never waits for a disk or a network. An alert is sent only after it lies in the folder, and lies there until it
was received, its receiver said that it is gone (410), or a day of attempts is over. What is sent, and how, is decided
in `webhook.py`; where it may go, by the rules, anew at every attempt.
"""

import collections
import dataclasses
import heapq
import itertools
import json
import logging
import math
import pathlib
import random
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jstream.errors import UserError
from jstream.serving import access
from jstream.serving.access import HostRules, NotAllowed, Target
from jstream.serving.spool import Spool
from jstream.serving.webhook import SECRET_FLAG, Answer, Attempt, signed_headers

SCHEMES = ("https", "http")
FIRST_DELAY, LONGEST_DELAY = 1.0, 600.0  # seconds before the second attempt, and before the late ones
JITTER = 0.25  # of a delay, at most, is left out by chance, so that many alerts do not come back at once
LONGEST_ASKED = 3600.0  # seconds that a receiver may ask us to wait
GIVE_UP = 86400.0  # seconds after which an alert is given up
WORKERS = 8  # attempts at a time
PER_RECEIVER = 2  # of them to one receiver: one that does not answer holds up its own alerts alone
MAX_PENDING, MAX_BYTES = 10_000, 64 * 2**20  # alerts that wait, and bytes of them
GRACE, CLOSING = 2.0, 1.0  # seconds at the end for attempts to finish, and, broken off, for their threads
WRITING = 10.0  # seconds for the last ones to be written: a disk may have fallen behind
GONE = 410


class Clock:
    """The time as alerts know it."""

    def now(self) -> float:
        """Seconds, never set back."""
        return time.monotonic()

    def unix(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, changed: threading.Condition, seconds: float | None) -> None:
        """Waits for a notice on a condition that is held, or until so many seconds are over."""
        changed.wait(seconds)


@dataclasses.dataclass(frozen=True)
class Alert:
    """One reply for one webhook.

    Attributes:
        id: the same at every attempt, and of no other alert ever: receivers tell doubles by it.
        url: of the webhook.
        stream: id of the stream.
        query: text of the query that the webhook came with.
        event: as in a line of `events.jsonl`.
    """

    id: str
    url: str
    stream: str
    query: str
    event: Mapping[str, Any]

    def body(self) -> bytes:
        """What is posted: JSON in ASCII, the same bytes every time."""
        fields = {"id": self.id, "stream": self.stream, "query": self.query, "event": dict(self.event)}
        return json.dumps(fields, separators=(",", ":")).encode("ascii")


class Counts(NamedTuple):
    """How it stands.

    Attributes:
        pending: alerts that wait or are under way.
        delivered: alerts that were received.
        failed: attempts that were not.
        given_up: alerts that never will be: a day was over, or the receiver is gone.
        refused: alerts that were not accepted, as too many waited.
        unwritten: alerts that could not be written to the folder, and are delivered all the same.
        damaged: files found in the folder that were no alerts, and were set aside.
    """

    pending: int
    delivered: int
    failed: int
    given_up: int
    refused: int
    unwritten: int
    damaged: int


def delay(attempts: int, asked: float | None, chance: float) -> float:
    """Seconds until the next attempt.

    Args:
        attempts: how many there were.
        asked: what the receiver asked for, or None.
        chance: in [0, 1).
    """
    backoff = min(FIRST_DELAY * 2.0 ** min(attempts - 1, 30), LONGEST_DELAY)
    return max(backoff * (1 - JITTER * chance), min(asked or 0.0, LONGEST_ASKED))


@dataclasses.dataclass(eq=False)
class _Pending:
    """An alert on its way: what is posted, since when (unix), and by the clock when it will be given up."""

    alert: Alert
    body: bytes
    created: float
    end: float
    attempts: int = 0


@dataclasses.dataclass
class _Receiver:
    """What waits for one host and port.

    Attributes:
        waiting: a heap of (when it is due, a number, what).
        under_way: attempts that go on.
        tried: when the last one began.
        failing: its last answer was not the wanted one, which was logged.
    """

    name: str
    waiting: list[tuple[float, int, _Pending]] = dataclasses.field(default_factory=list)
    under_way: int = 0
    tried: float = -math.inf
    failing: bool = False


class Alerts:
    """Delivers alerts from threads of its own, beginning with those that an earlier server left.

    Args:
        rules: which hosts may be posted to, read anew at every attempt.
        secret: key of the signatures.
        spool: the folder. None keeps alerts in memory alone, where they end with the process.
        clock: the time.
        resolve: looks names up.
        chance: gives numbers in [0, 1) for the delays.
        tls: how certificates are verified; the system's way where None.
        max_pending, max_bytes: bounds of what waits; beyond, the oldest are kept and new ones refused.

    Raises:
        UserError: the folder cannot be used, or the secret is empty.
    """

    def __init__(
        self,
        rules: HostRules,
        secret: bytes,
        spool: str | pathlib.Path | None = None,
        clock: Clock | None = None,
        resolve: access.Resolve = access.resolve,
        chance: Callable[[], float] = random.random,
        tls: ssl.SSLContext | None = None,
        max_pending: int = MAX_PENDING,
        max_bytes: int = MAX_BYTES,
    ):
        if not secret:
            raise UserError(f"{SECRET_FLAG}: expected a secret, found nothing; write one into the file")
        self._rules, self._secret, self._resolve = rules, secret, resolve
        self._clock, self._chance = clock or Clock(), chance
        self._tls = tls or ssl.create_default_context()
        self._max_pending, self._max_bytes = max_pending, max_bytes
        self._spool = None if spool is None else Spool(spool)
        self._changed = threading.Condition()  # guards all that follows
        self._pending: dict[str, _Pending] = {}  # by id, in the order they came
        self._bytes = 0
        self._unwritten: collections.deque[_Pending] = collections.deque()
        self._receivers: dict[str, _Receiver] = {}
        self._attempts: set[Attempt] = set()
        self._number = itertools.count()
        self._counted: collections.Counter[str] = collections.Counter()
        self._untold = 0  # refused, and not logged yet: the log may block, and `post` may not
        self._closing = False
        self._load()
        self._writer = threading.Thread(target=self._write, name="alerts writer", daemon=True)
        self._workers = [threading.Thread(target=self._work, name="alerts", daemon=True) for _ in range(WORKERS)]
        for thread in [self._writer] * (self._spool is not None) + self._workers:
            thread.start()

    def check(self, url: str) -> Target:
        """Whether a webhook may be posted to; looks its name up, and may take as long as that does.

        Raises:
            NotAllowed: it may not, and why.
        """
        return access.check_url(url, SCHEMES, self._rules, self._resolve, credentials=False)

    def post(self, alert: Alert) -> bool:
        """Accepts an alert; False, counted as refused, where too many wait or this is closed. Never blocks.

        A writer thread puts it into the folder, a moment later: a disk may take many milliseconds to say that a file is
        on it, and callers step the model. A server killed within that moment loses the alert, as it would have lost the
        reply had it been killed a moment earlier.
        """
        body = alert.body()
        with self._changed:
            if alert.id in self._pending:
                return True
            full = len(self._pending) >= self._max_pending or self._bytes + len(body) > self._max_bytes
            if full or self._closing:
                self._counted["refused"] += 1
                self._untold += full
                return False
            pending = _Pending(alert, body, self._clock.unix(), self._clock.now() + GIVE_UP)
            self._add(pending)
            if self._spool is None:
                self._line_up(pending, self._clock.now())
            else:
                self._unwritten.append(pending)
            self._changed.notify_all()
        return True

    def counts(self) -> Counts:
        """How it stands, since this server began."""
        with self._changed:
            counted = {name: self._counted[name] for name in Counts._fields if name != "pending"}
            return Counts(pending=len(self._pending), **counted)

    def close(self) -> None:
        """Ends soon: what was posted is written, attempts get `GRACE` seconds more, the rest stays in the folder."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        end = time.monotonic() + WRITING
        self._join(GRACE)
        with self._changed:
            attempts = list(self._attempts)
        for attempt in attempts:
            attempt.stop("the server stops")
        self._join(CLOSING)
        if self._spool is not None:
            self._writer.join(max(0.0, end - time.monotonic()))
            self._spool.close()
        lost = len(self._unwritten if self._spool is not None else self._pending)
        if lost:
            why = "the folder was too slow" if self._spool is not None else "--spool=FOLDER keeps them"
            logging.warning("alerts: %d were not delivered and are lost; %s", lost, why)

    def __enter__(self) -> "Alerts":
        return self

    def __exit__(self, *_):
        self.close()

    def _join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._workers:
            thread.join(max(0.0, end - time.monotonic()))

    # --------------------------------------------------------------------------------------------- into the folder

    def _load(self) -> None:
        """What an earlier server left, whose attempts begin again at once."""
        if self._spool is None:
            return
        entries, damaged = self._spool.read()
        for entry in entries:
            try:
                alert = Alert(*(entry[field.name] for field in dataclasses.fields(Alert)))
                created = float(entry["created"])
                texts = (alert.id, alert.url, alert.stream, alert.query)
                if not (all(isinstance(text, str) for text in texts) and isinstance(alert.event, dict)):
                    raise TypeError("fields of other kinds")
            except (KeyError, TypeError, ValueError, OverflowError):
                damaged.append(self._spool.set_aside(str(entry["id"])))
                continue
            age = max(0.0, self._clock.unix() - created)
            pending = _Pending(alert, alert.body(), created, self._clock.now() + GIVE_UP - age)
            self._add(pending)
            self._line_up(pending, self._clock.now())
        for name in damaged:
            logging.warning("alerts: %s: expected an alert, found a damaged file, and set it aside", name)
        self._counted["damaged"] += len(damaged)

    def _write(self) -> None:
        """The writer thread's whole life. At the end it writes what is left."""
        assert self._spool is not None
        while True:
            with self._changed:
                while not self._unwritten and not self._closing:
                    self._changed.wait()
                if not self._unwritten:
                    return
                pending = self._unwritten.popleft()
            written = False
            try:
                self._spool.write(_entry(pending))
                written = True
            except Exception as error:  # a thread has nobody to tell, and the next one may go well
                logging.warning("alerts: %s: not written (%s), sent all the same", pending.alert.id, error)
            with self._changed:
                self._counted["unwritten"] += not written
                self._line_up(pending, self._clock.now())
                self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- what waits, guarded

    def _add(self, pending: _Pending) -> None:
        self._pending[pending.alert.id] = pending
        self._bytes += len(pending.body)

    def _line_up(self, pending: _Pending, due: float) -> None:
        name = _receiver_of(pending.alert.url)
        receiver = self._receivers.setdefault(name, _Receiver(name))
        heapq.heappush(receiver.waiting, (due, next(self._number), pending))

    def _take(self) -> tuple[_Receiver, _Pending] | None:
        """The next alert to send, of the receiver that was tried longest ago; waits for one, and is None at the end."""
        with self._changed:
            while not self._closing:
                now = self._clock.now()
                free = [r for r in self._receivers.values() if r.waiting and r.under_way < PER_RECEIVER]
                ready = [receiver for receiver in free if receiver.waiting[0][0] <= now]
                if ready:
                    receiver = min(ready, key=lambda receiver: receiver.tried)
                    receiver.tried = now
                    receiver.under_way += 1
                    return receiver, heapq.heappop(receiver.waiting)[2]
                due = min((receiver.waiting[0][0] for receiver in free), default=None)
                self._clock.wait(self._changed, None if due is None else due - now)
        return None

    # --------------------------------------------------------------------------------------------------- the workers

    def _work(self) -> None:
        """A worker thread's whole life."""
        while (taken := self._take()) is not None:
            receiver, pending = taken
            answer = self._send(pending)
            over = self._settle(receiver, pending, answer)
            for each in over:
                self._forget(each)

    def _send(self, pending: _Pending) -> Answer:
        attempt, alert = Attempt(), pending.alert
        with self._changed:
            self._attempts.add(attempt)
        try:
            target = self.check(alert.url)
            unix = self._clock.unix()
            headers = signed_headers(alert.id, int(unix), pending.body, self._secret)
            return attempt.post(target, headers, pending.body, self._tls, unix)
        except NotAllowed as error:
            return Answer(None, str(error))
        except Exception as error:  # a thread has nobody to tell, and others to serve
            return Answer(None, type(error).__name__)
        finally:
            with self._changed:
                self._attempts.discard(attempt)

    def _settle(self, receiver: _Receiver, pending: _Pending, answer: Answer) -> list[_Pending]:
        """Lines the alert up again, or gives back what is over with this answer."""
        with self._changed:
            receiver.under_way -= 1
            pending.attempts += 1
            now = self._clock.now()
            over: list[_Pending] = []
            if answer.received:
                over.append(pending)
                self._counted["delivered"] += 1
            elif not self._closing or answer.status is not None:  # what we broke off was no failure
                self._counted["failed"] += 1
                if answer.status == GONE:  # whatever waits for this url is not wanted either
                    url = pending.alert.url
                    over = [pending, *(other for _, _, other in receiver.waiting if other.alert.url == url)]
                    receiver.waiting = [entry for entry in receiver.waiting if entry[2].alert.url != url]
                    heapq.heapify(receiver.waiting)
                elif now >= pending.end:
                    over.append(pending)
                self._counted["given_up"] += len(over)
            if not over:
                due = min(now + delay(pending.attempts, answer.retry_after, self._chance()), pending.end)
                self._line_up(pending, due)
            news = self._news(receiver, answer, over)
            if not receiver.waiting and not receiver.under_way:
                self._receivers.pop(receiver.name, None)
            self._changed.notify_all()
        for line in news:
            logging.warning("alerts: %s", line)
        return over

    def _news(self, receiver: _Receiver, answer: Answer, over: list[_Pending]) -> list[str]:
        """What the log should say of an answer: the first failure of a receiver, not every one."""
        news = []
        if self._untold:
            news.append(f"{self._untold} were refused: too many wait")
            self._untold = 0
        if answer.received:
            news += [f"{receiver.name} takes them again"] * receiver.failing
            receiver.failing = False
        elif over:
            news.append(f"{len(over)} for {receiver.name} given up, {over[0].alert.id} the first: {answer}")
        elif not receiver.failing and not self._closing:
            news.append(f"{receiver.name} did not take one, which is tried again for a day: {answer}")
            receiver.failing = True
        return news

    def _forget(self, pending: _Pending) -> None:
        if self._spool is not None:
            try:
                self._spool.remove(pending.alert.id)
            except OSError as error:
                logging.warning("alerts: %s: not removed (%s), comes again at the next start", pending.alert.id, error)
        with self._changed:
            del self._pending[pending.alert.id]
            self._bytes -= len(pending.body)


def _entry(pending: _Pending) -> dict[str, Any]:
    """What lies in the folder."""
    fields = {field.name: getattr(pending.alert, field.name) for field in dataclasses.fields(Alert)}
    return {**fields, "event": dict(pending.alert.event), "created": pending.created}


def _receiver_of(url: str) -> str:
    """Host and port of a url, roughly: what is sent to one of them shares its bound."""
    try:
        return urllib.parse.urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""
