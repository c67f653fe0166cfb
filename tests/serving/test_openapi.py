"""The OpenAPI document against what is served: whatever a client sends, the answer is one that the document tells."""

import subprocess
import sys

import pytest
from served import LIMITS, Served, ask

from jstream.serving.access import HostRules
from jstream.serving.guard import Door
from jstream.serving.outside import Outside

# Too large a body is too large before anybody looks into it; and a question of few characters may be of many tokens.
EXPECTED = """
[checks]
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "406", "409", "413", "422"]

[[operations]]
include-name = "POST /v1/streams/{name}/queries"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422", "429"]
"""
TOKEN = "a-token-of-sixteen-and-more"


@pytest.fixture(scope="module")
def served():
    outside = Outside(HostRules(["127.0.0.1"], "--source_host"))
    with Served(LIMITS, Door("127.0.0.1", TOKEN), outside) as server:
        yield server.ready()


@pytest.mark.parametrize("known", [False, True])
def test_every_answer_is_one_that_the_document_tells(served, tmp_path, known):
    """With valid and invalid requests of every kind, with and without the token, for streams that are there or not."""
    stream = served.open(threshold=0)
    served.see(stream, range(3))
    parameters = f'parameters = {{ "path.name" = "{stream.id}" }}\n' if known else ""
    (tmp_path / "schemathesis.toml").write_text(parameters + EXPECTED)
    command = [
        sys.executable, "-m", "schemathesis.cli", f"--config-file={tmp_path / 'schemathesis.toml'}", "--no-color",
        "run", f"http://127.0.0.1:{served.port}/openapi.json", f"--header=Authorization: Bearer {TOKEN}",
        "--checks=all", "--max-examples=10", "--max-time=40", "--seed=1", "--suppress-health-check=all",
        *(["--exclude-path=/v1/streams/{name}/events"] if known else []),  # which does not end
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]


def test_the_document_tells_of_the_token_and_of_every_refusal(served):
    document = ask(served.port, "GET", "/openapi.json", None, {"authorization": f"Bearer {TOKEN}"})[2]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path != "/healthz":
                assert operation["security"] and {"401", "403"} <= operation["responses"].keys()
            for status, response in operation["responses"].items():
                if status >= "400" and (path, status) != ("/healthz", "503"):
                    schema = response["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/Refusal"}
