"""benchmarks.peers: what is counted as honoured, and servers that draw what the pipeline draws."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from json import loads
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from benchmarks import peer_systems, peers
from benchmarks.peer_systems import PEERS, Asked, Peer, Serving
from tests.support.pipelines import build


def colour_of(fields: dict[str, Any]) -> tuple[int, int, int]:
    """A picture that depends on every field of a request."""
    size = fields["height"] + 3 * fields["width"]
    return (
        int(fields.get("seed", 0)) * 20,
        (fields["num_inference_steps"] * 5 + size // 8) % 256,
        int(fields["guidance_scale"] * 20),
    )


class Handler(BaseHTTPRequestHandler):
    """Draws one colour; takes no scheduler, and forgets the seed 0."""

    def do_POST(self) -> None:
        fields = loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "scheduler" in fields:
            self.send_error(422)
            return
        fields["seed"] = fields.get("seed") or 9
        out = io.BytesIO()
        Image.new("RGB", (fields["width"], fields["height"]), colour_of(fields)).save(out, "PNG")
        self.send_response(200)
        self.send_header("Content-Length", str(len(out.getvalue())))
        self.end_headers()
        self.wfile.write(out.getvalue())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def serving() -> Iterator[Serving]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield Serving(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_is_honoured_ignored_and_refused(serving: Serving) -> None:
    expected = {}
    for name, fields in peers.PARAMETERS.items():
        asked = {**peers.DEFAULTS, **fields}
        size = (asked["width"], asked["height"])
        expected[name] = Image.new("RGB", size, colour_of(asked))
    peer = Peer("one", lambda fields: Asked("/", dict(fields), {}))
    told = peers.parameters_of(peer, serving, expected)
    assert told["seed 7"] == told["size"] == told["steps"] == told["guidance"] == "honoured"
    assert told["seed 0"] == "ignored"
    assert told["scheduler"] == "refused (422)"


def test_both_mixes_ask_for_the_same_every_time() -> None:
    first, again = peers.mixes(60), peers.mixes(60)
    assert first == again
    assert len({request["height"] for request in first["three classes"]}) == 3
    settings = [
        (request["height"], request["num_inference_steps"], request["guidance_scale"])
        for request in first["all different"]
    ]
    assert len(set(settings)) > 50


def test_a_batch_is_drawn_by_one_call_for_each_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(peer_systems.SERVERS))
    monkeypatch.delitem(sys.modules, "drawing", raising=False)
    import drawing

    pipeline = build("stable_diffusion")
    calls: list[int] = []

    def counted(prompts: list[str], **arguments: Any) -> Any:
        calls.append(len(prompts))
        return pipeline(prompts, **arguments)

    settings = {"height": 32, "width": 32, "guidance_scale": 1.0}
    batch = [
        {"prompt": "a cat", "seed": seed, "num_inference_steps": steps, **settings}
        for seed, steps in ((1, 2), (2, 3), (3, 2))
    ]
    together = drawing.draw_together(counted, batch)
    assert sorted(calls) == [1, 2]
    alone = [drawing.draw_together(pipeline, [fields])[0] for fields in batch]
    assert together == alone
    assert len(set(alone)) == 3


def test_ours_comes_first_and_every_name_is_a_folder_of_its_own() -> None:
    assert PEERS[0].name == "ours"
    assert len({peer_systems.slug(peer.name) for peer in PEERS}) == len(PEERS)


def test_figures_hold_ours_against_each_other_by_round() -> None:
    def measured(rates: list[float], p95_s: list[float]) -> peers.Measured:
        return peers.Measured({"mix": rates}, {"mix": p95_s}, {}, {"seed 7": "honoured"})

    figures = peers.figures_of(
        {
            "ours": measured([4.0, 6.0], [1.0, 1.0]),
            "other": measured([2.0, 2.0], [4.0, 5.0]),
            "absent": peers.Measured(failure="not installed: …"),
        }
    )
    by_name = {figure.name: figure for figure in figures}
    assert by_name["mix: ours / other"].value.values == (2.0, 3.0)
    assert by_name["mix: p95 of short requests, ours / other"].value.values == (0.25, 0.2)
    assert not any("absent" in name for name in by_name)
