"""A client of an OpenAI-compatible endpoint, in which nothing is paid twice.

What fails for a while is tried again: too many requests, errors of the server, timeouts, dropped connections and
answers that are no JSON. Every answer is kept on disk under a hash of the model, the messages and the parameters
before anyone uses it; equal requests, of threads or of processes on the same disk, wait for the first one. What an
answer says is not judged here (`asking.py`).
"""

import contextlib
import dataclasses
import email.utils
import fcntl
import hashlib
import http.client
import itertools
import json
import math
import os
import pathlib
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jstream.config import ConfigError
from jstream.errors import UserError

KEY = "OPENAI_API_KEY"  # the environment's
MAX_RESPONSE = 8 * 2**20  # bytes; answers have some thousand
MAX_WAIT = 120.0  # seconds between two tries, whatever the server asks for
DEFAULT_OPTIONS = {"temperature": 0.7, "max_tokens": 1024}


class LLMError(UserError):
    """The endpoint does not answer, or not as one should; the message is one line."""


class RequestError(LLMError):
    """The endpoint takes others, but not this request: it is too long, or against its rules."""


class _Passing(Exception):
    """A failure that may pass; `busy`: for whatever is asked; `wait`: seconds that the server asks for."""

    def __init__(self, message: str, busy: bool = False, wait: float = 0.0):
        super().__init__(message)
        self.busy, self.wait = busy, wait


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where answers come from, and how they are asked for.

    Attributes:
        url: http or https, up to `/v1`.
        model: as the endpoint names it.
        cache: folder of the answers, made if missing.
        options: parameters of each request, over DEFAULT_OPTIONS; None takes one out, `seed` too.
        requests_a_minute: at most, tries included; None does not limit them.
        retries: of a request, after its first try.
        back_off: seconds before the first retry; doubled for each further one.
        timeout: seconds for one try.

    Raises:
        ConfigError: for a value out of range.
    """

    url: str
    model: str
    cache: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    requests_a_minute: float | None = None
    retries: int = 8
    back_off: float = 1.0
    timeout: float = 120.0

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.username is parts.password is None
            good = good and (parts.port is None or parts.port > 0)
        except ValueError:
            good = False
        if not good:
            raise ConfigError(f"llm: expected http://HOST:PORT/v1 or https://…, its key in ${KEY}, found {self.url!r}")
        if not self.model:
            raise ConfigError("llm_model: expected the name of a model, found none")
        limits = {"retries": (0, 100), "back_off": (0, 60), "timeout": (0.001, 3600)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"{name}: expected {least} to {most}, found {getattr(self, name)}")
        if self.requests_a_minute is not None and not self.requests_a_minute > 0:
            raise ConfigError(f"requests_a_minute: expected a number above 0, found {self.requests_a_minute}")

    @property
    def parameters(self) -> dict[str, Any]:
        """Of each request, beside the model and the messages."""
        return {key: value for key, value in {**DEFAULT_OPTIONS, **self.options}.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: maybe empty.
        refusal: why it would not answer, or None.
        cut: whether it was cut off at the most tokens allowed.
        tokens_in, tokens_out: as the endpoint counts them; 0 where it does not.
    """

    text: str
    refusal: str | None = None
    cut: bool = False
    tokens_in: int = 0
    tokens_out: int = 0


@dataclasses.dataclass
class Spent:
    """What answers took: those paid for, those of the cache, and tries that failed."""

    paid: int = 0
    cached: int = 0
    failures: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached_in: int = 0
    cached_out: int = 0

    def __iadd__(self, other: "Spent") -> "Spent":
        for name, number in vars(other).items():
            setattr(self, name, getattr(self, name) + number)
        return self

    def cost(self, price_in: float, price_out: float) -> tuple[float, float]:
        """Of what was paid for, and what the cache has saved, by prices of a million tokens."""
        cost = lambda tokens_in, tokens_out: (tokens_in * price_in + tokens_out * price_out) / 1e6
        return cost(self.tokens_in, self.tokens_out), cost(self.cached_in, self.cached_out)


class Pace:
    """Turns for requests, at even distances, so that no more begin in a minute; None does not limit them."""

    def __init__(self, a_minute: float | None, clock: Callable[[], float] = time.monotonic):
        self._distance, self._clock = 60 / a_minute if a_minute else 0.0, clock
        self._lock, self._next = threading.Lock(), 0.0

    def turn(self) -> float:
        """Takes the next turn and returns the seconds until it."""
        with self._lock:
            now = self._clock()
            at = max(now, self._next)
            self._next = at + self._distance
        return at - now


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address would be sent the key, and would be asked by GET."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


class Client:
    """An endpoint in use; threads may share it."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint = endpoint
        parts = urllib.parse.urlsplit(endpoint.url)
        self._url = parts._replace(path=parts.path.rstrip("/") + "/chat/completions", fragment="").geturl()
        self._key = os.environ.get(KEY, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"{KEY}: expected printable ASCII, found something else")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._pace, self._closed, self._last_answer = Pace(endpoint.requests_a_minute), threading.Event(), -math.inf
        self._cache = pathlib.Path(endpoint.cache)
        (self._cache / "locks").mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        """Ends all waiting, of other threads: what is asked next, or again, is an LLMError."""
        self._closed.set()

    def complete(self, messages: Sequence[Mapping[str, Any]], spent: Spent, **parameters: Any) -> Answer:
        """What the model answers: from the cache, or asked for and kept.

        Args:
            messages: as the protocol has them; images as data URLs.
            spent: what it takes is added here.
            parameters: of this request, over those of the endpoint.

        Raises:
            RequestError: it refuses this request (400, 413, 422), or fails with it while it answers others.
            LLMError: it fails in another way that does not pass, or that has not passed after all retries.
        """
        parameters = self.endpoint.parameters | parameters
        asked = json.dumps([self.endpoint.model, messages, parameters], sort_keys=True)
        unsent = {name for name, value in self.endpoint.options.items() if value is None}
        key = hashlib.sha256(asked.encode()).hexdigest()
        file = self._cache / key[:2] / f"{key}.json"
        answer = _kept(file)
        if answer is None:
            with self._alone(key):
                answer = _kept(file)  # by whoever was first
                if answer is None:
                    body = {"model": self.endpoint.model, "messages": messages, **parameters}
                    answer = self._ask({name: body[name] for name in body if name not in unsent}, spent)
                    _keep(file, answer)
                    spent += Spent(paid=1, tokens_in=answer.tokens_in, tokens_out=answer.tokens_out)
                    return answer
        spent += Spent(cached=1, cached_in=answer.tokens_in, cached_out=answer.tokens_out)
        return answer

    @contextlib.contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """One at a time for each of 4096 groups of keys, among threads and processes; the killed let go."""
        with (self._cache / "locks" / key[:3]).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _ask(self, body: dict[str, Any], spent: Spent) -> Answer:
        data, failed = json.dumps(body).encode(), math.inf
        for attempt in itertools.count():
            self._sleep(self._pace.turn())
            try:
                answer = self._post(data)
                self._last_answer = time.monotonic()
                return answer
            except _Passing as failure:
                spent.failures += 1
                if attempt == self.endpoint.retries:
                    its_own = self._last_answer > failed and not failure.busy  # others were answered between two tries
                    raise (RequestError if its_own else LLMError)(
                        f"{self._url}: expected an answer, found {attempt + 1} failures, the last of them: "
                        f"{self._plain(str(failure))}; start again when it answers"
                    ) from None
                failed = time.monotonic()
                wait = min(self.endpoint.back_off * 2.0**attempt, MAX_WAIT) * random.uniform(0.5, 1.0)
                self._sleep(max(wait, min(failure.wait, MAX_WAIT)))
        raise AssertionError

    def _sleep(self, seconds: float) -> None:
        if self._closed.wait(seconds):
            raise LLMError(f"{self._url}: stopped")

    def _post(self, data: bytes) -> Answer:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._url, data, headers)
        deadline = time.monotonic() + self.endpoint.timeout
        try:
            try:
                with self._opener.open(request, timeout=self.endpoint.timeout) as response:
                    return _answer(_read(response, MAX_RESPONSE, deadline))
            except urllib.error.HTTPError as error:
                with error:
                    raise self._failure(error, deadline) from None
        except LLMError:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise _Passing(str(reason) or type(reason).__name__) from None

    def _failure(self, error: urllib.error.HTTPError, deadline: float) -> Exception:
        """What an HTTP status other than 200 means."""
        content = _read(error, 2**16, deadline, more_is_wrong=False).decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError, TypeError, KeyError):
            content = json.loads(content)["error"]["message"]
        said = f"{error.code} {self._plain(str(content) or str(error.reason))}"
        if error.code in (408, 425, 429) or error.code >= 500:
            return _Passing(said, error.code == 429, _retry_after(error.headers.get("Retry-After")))
        kind = RequestError if error.code in (400, 413, 422) else LLMError
        return kind(f"{self._url}: expected an answer, found {said}")

    def _plain(self, text: str) -> str:
        """In one line, not long, and without the key, which some servers tell back."""
        text = " ".join(text.split())
        return (text.replace(self._key, "…") if self._key else text)[:300]


def _read(response: Any, most: int, deadline: float, more_is_wrong: bool = True) -> bytes:
    """The body, in time: a timeout of the socket alone would let a server drip for ever."""
    parts, size = [], 0
    while part := response.read1(min(2**16, most + 1 - size)):
        parts.append(part)
        size += len(part)
        if size > most:
            if more_is_wrong:
                raise _Passing(f"an answer of more than {most} bytes")
            break
        if time.monotonic() > deadline:
            raise TimeoutError("timed out")
    return b"".join(parts)


def _answer(content: bytes) -> Answer:
    try:
        body = json.loads(content)
        choice = body["choices"][0]
        message = choice["message"]
        text, refusal = message.get("content") or "", message.get("refusal") or None
        if choice.get("finish_reason") == "content_filter":
            refusal = refusal or "filtered"
        usage = body.get("usage") or {}
        tokens = [usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")]
        return _checked(Answer(text, refusal, choice.get("finish_reason") == "length", *tokens))
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        raise _Passing(f"expected a chat completion, found {content[:200]!r}") from None


def _checked(answer: Answer) -> Answer:
    texts = isinstance(answer.text, str) and isinstance(answer.refusal, str | None) and isinstance(answer.cut, bool)
    tokens = answer.tokens_in, answer.tokens_out
    if not texts or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in tokens):
        raise TypeError
    return answer


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After: a number, or a date; 0 for none and for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, float(value))  # type: ignore[arg-type]
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())  # type: ignore[arg-type]
    return 0.0


def _kept(file: pathlib.Path) -> Answer | None:
    try:
        return _checked(Answer(**json.loads(file.read_bytes())))
    except (FileNotFoundError, ValueError, TypeError, RecursionError):  # a damaged file is asked for again
        return None


def _keep(file: pathlib.Path, answer: Answer) -> None:
    file.parent.mkdir(exist_ok=True)
    partial = file.with_suffix(".partial")  # one writer at a time, see `_alone`
    partial.write_text(json.dumps(dataclasses.asdict(answer)))
    partial.replace(file)
