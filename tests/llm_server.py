"""An OpenAI-compatible endpoint on loopback that answers by rule, and misbehaves on a schedule.

Its answers depend on what it is asked and on nothing else. It counts what it was asked and what it has answered to the
end, by model, messages and parameters: two full answers to one of these have been paid for twice.
"""

import collections
import hashlib
import http.server
import json
import re
import threading
import time

from jstream.data.synthesis import prompts

FAULTS = ("429", "500", "timeout", "dropped", "malformed", "no completion", "too large")


def good(number: int) -> str | None:
    """The schedule of an endpoint without faults."""


def by_turns(number: int) -> str | None:
    """Two good tries, then a fault, each kind in its turn."""
    return FAULTS[number // 3 % len(FAULTS)] if number % 3 == 2 else None


class LLMServer:
    """The endpoint; a context manager.

    Attributes:
        schedule: number of a try, from 0 on, to what goes wrong with it: of FAULTS, an HTTP status, or None.
        rule: (system message, texts and images of the user, seed) to a text, a whole message, or a `fault`.
        on_answer: called with the number of answers so far.
        asked, answered: how often, by model, messages and parameters.
        retry_after: seconds, as a 429 says them.
        times: of all tries, on the monotonic clock.
        headers: of the last try.
    """

    def __init__(self, schedule=good, rule=None, on_answer=lambda number: None):
        self.schedule, self.rule, self.on_answer = schedule, rule or by_rule, on_answer
        self.asked, self.answered = collections.Counter(), collections.Counter()
        self.retry_after, self.slow, self.times, self.headers = "0", 0.6, [], {}
        self.lock, self.number, self.port, self.server = threading.Lock(), 0, 0, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        """Listens, after the first time at the same port."""
        self.server = _Server(("127.0.0.1", self.port), _Handler)
        self.server.endpoint, self.port = self, self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        """Dies: whoever connects is refused."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    def message(self, body):
        """By the rule."""
        system, user = body["messages"]
        parts = user["content"] if isinstance(user["content"], list) else [{"type": "text", "text": user["content"]}]
        said = [part["text"] for part in parts if part["type"] == "text"]
        images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        message = self.rule(system["content"], said, images, body.get("seed"))
        message = message if isinstance(message, dict) else {"content": message}
        return message | {"tokens_in": sum(map(len, said))}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 64


class _Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(405, b'{"error": {"message": "expected POST"}}')

    def do_POST(self):
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        with endpoint.lock:
            number, endpoint.number = endpoint.number, endpoint.number + 1
            endpoint.asked[key] += 1
            endpoint.times.append(time.monotonic())
            endpoint.headers = dict(self.headers)
        message = endpoint.message(body)
        fault = (
            "404" if self.path != "/v1/chat/completions" else endpoint.schedule(number) or message.pop("fault", None)
        )
        if fault == "timeout":
            time.sleep(endpoint.slow)
        elif fault == "malformed":
            self.answer(200, b'{"choices": [{"message": {"content": "Yes')
        elif fault == "no completion":
            self.answer(200, b'{"error": {"message": "upstream is busy"}}')
        elif fault == "too large":
            self.answer(200, b" " * (9 * 2**20))
        elif fault is not None and fault.isdigit():
            self.answer(int(fault), json.dumps({"error": {"message": f"this is\na {fault}"}}).encode())
        else:
            content = json.dumps(completion(message)).encode()
            if fault in ("dropped", "drip"):
                self.answer(200, content, cut=len(content) // 2, drip=0.02 if fault == "drip" else 0)
                return
            with endpoint.lock:  # before the last byte: whoever has the answer finds it counted
                endpoint.answered[key] += 1
                answered = endpoint.answered.total()
            self.answer(200, content)
            endpoint.on_answer(answered)

    def answer(self, status, content, cut=None, drip=0):
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 429:
                self.send_header("Retry-After", self.server.endpoint.retry_after)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:1/elsewhere")
            self.end_headers()
            for byte in content if drip else b"":
                self.wfile.write(bytes([byte]))
                time.sleep(drip)
            self.wfile.write(content[:cut])
        except OSError:  # the client is gone, as clients of slow servers are
            pass
        self.close_connection = True


def completion(message):
    finish, tokens_in = message.pop("finish_reason", "stop"), message.pop("tokens_in")
    usage = {"prompt_tokens": tokens_in, "completion_tokens": len(message.get("content") or "")}
    return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}


def by_rule(system, said, images, seed):
    """Answers that depend on the question only, as a model's might."""
    lines = re.findall(r"^\d+\. (.*)$", said[0], re.MULTILINE)
    if system.startswith(prompts.REWRITE.task):
        return json.dumps({"lines": [f"You {line}." for line in lines]})
    if system.startswith(prompts.CHAT_ANSWER.task):
        notes = re.findall(r"^- (.*)$", said[0], re.MULTILINE)
        query = said[0].rsplit(": ", 1)[1]
        last = notes[-1].removesuffix(prompts.STILL_GOING_ON) if notes else "Nothing."
        return json.dumps({"answer": f"{len(notes)} notes on {query!r}; {last}"})
    if system.startswith(prompts.PAIR.task):
        return json.dumps({"change": "" if images[0] == images[1] else f"Between {digest(images[0])} and the next."})
    if system.startswith(prompts.CLEAN.task):
        return json.dumps({"lines": ["" if number % 4 == 3 else line for number, line in enumerate(lines)]})
    if system.startswith((prompts.EVENT_CAPTION.task, prompts.ACTION_CAPTION.task)):
        hint = said[0].removeprefix("The hint: ")
        return "```json\n" + json.dumps({"caption": f"Seen: {hint}", "why": "not asked for"}) + "\n```"
    if system.startswith(prompts.GROUND.task):  # a hint may say where it will be found
        start, end = map(float, re.findall(r"[\d.]+", said[0])[-2:] or (0, 0))
        return json.dumps({"found": end > 0, "start": start, "end": end})
    if system.startswith(prompts.AS_QUERY.task):
        number = int(re.findall(r"number (\d+)\.", said[0])[-1])
        tense = "When did" if prompts.BACKWARD in said[0] else "Tell me when"
        return json.dumps(
            {"query": f"{tense} this: {lines[number - 1]}", "fits_only_this": "again" not in lines[number - 1]}
        )
    if system.startswith(prompts.CHANGING_QUESTION.task):
        return json.dumps(
            {"question": "How many so far?", "answers": [str(n // 2) if n else "" for n in range(len(lines))]}
        )
    raise AssertionError(system)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
