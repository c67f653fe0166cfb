"""What the OpenAPI document says beyond the handlers: the token, what the guard refuses, and this server's limits."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from jstream.serving.guard import PUBLIC, Door
from jstream.serving.limits import Limits

BEARER = "token"


def document(app: FastAPI, door: Door, limits: Limits) -> dict[str, Any]:
    """The document of this server."""
    told = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    told["components"]["securitySchemes"] = {BEARER: {"type": "http", "scheme": "bearer"}}
    told["components"]["schemas"]["NewStream"]["properties"]["fps"]["maximum"] = limits.fps
    for path, operations in told["paths"].items():
        for operation in operations.values():
            if not path.startswith(PUBLIC) and door.token is not None:
                operation["security"] = [{BEARER: []}]
            if not path.startswith(PUBLIC) and door.token is None:
                operation["responses"].pop("401", None)
    return told
