"""GET /v1/models and /v1/models/ID, in OpenAI's words, and in KServe's where both have the path."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import Route

from gateway.door import Call
from gateway.gateway import Gateway
from gateway.json_replies import json_response
from gateway.limits import check_model
from gateway.routing import Model
from handler.errors import RequestError

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[Route]:
    """The routes of this module."""

    async def listed(call: Call) -> Response:
        allowed = None if call.key is None else call.key.models
        models = [
            _described(each)
            for each in gateway.fleet.models().values()
            if allowed is None or each.name in allowed
        ]
        return json_response({"object": "list", "data": models})

    async def one(call: Call) -> Response:
        model = gateway.fleet.model(call.request.path_params["name"])
        check_model(call.key, model.name)
        return json_response(_described(model))

    async def metadata(call: Call) -> Response:
        model = gateway.fleet.model(call.request.path_params["name"])
        check_model(call.key, model.name)
        return json_response(
            {
                "name": model.name,
                "platform": "torchserve",
                "inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [-1]}],
                "outputs": [
                    {"name": "images", "datatype": "BYTES", "shape": [-1]},
                    {"name": "seeds", "datatype": "INT64", "shape": [-1]},
                ],
            }
        )

    async def is_ready(call: Call) -> Response:
        name = call.request.path_params["name"]
        try:
            ready = gateway.fleet.model(name).is_ready
        except RequestError as error:
            return json_response({"name": name, "ready": False}, error.status)
        return json_response({"name": name, "ready": ready}, 200 if ready else 503)

    route = gateway.door.route
    return [
        route("/v1/models", listed, takes_place=False),
        route("/v1/models/{name}", one, takes_place=False),
        route("/v2/models/{name}", metadata, takes_place=False),
        route("/v2/models/{name}/ready", is_ready, keyless=True),
    ]


def _described(model: Model) -> dict[str, object]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_s,
        "owned_by": "torchserve",
        # KServe v1 asks at the same path.
        "name": model.name,
        "ready": model.is_ready,
    }
