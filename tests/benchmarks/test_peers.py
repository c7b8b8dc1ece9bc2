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

from benchmarks import peer_pictures, peer_requests, peer_systems, peers
from benchmarks.peer_systems import PEERS, Asked, Peer, PeerError, Serving
from tests.support.pipelines import build


def colour_of(fields: dict[str, Any]) -> tuple[int, int, int]:
    """A picture that depends on every field of a request."""
    size = fields["height"] + 3 * fields["width"]
    return (
        int(fields.get("seed", 0)) * 20,
        (fields["num_inference_steps"] * 5 + size // 8) % 256,
        int(fields["guidance_scale"] * 20),
    )


def picture_of(fields: dict[str, Any]) -> Image.Image:
    """Its colour, with a white half."""
    picture = Image.new("RGB", (fields["width"], fields["height"]), colour_of(fields))
    picture.paste((255, 255, 255), (0, 0, fields["width"] // 2, fields["height"]))
    return picture


def png_of(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Draws two colours; takes no scheduler, and forgets the seed 0."""

    def do_POST(self) -> None:
        fields = loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "scheduler" in fields:
            self.send_error(422)
            return
        fields["seed"] = fields.get("seed") or 9
        content = png_of(picture_of(fields))
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

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


@pytest.fixture
def peer() -> Peer:
    return Peer("one", lambda fields: Asked("/", dict(fields), {}))


def test_what_is_honoured_ignored_and_refused(peer: Peer, serving: Serving) -> None:
    expected = {
        name: picture_of({**peer_requests.DEFAULTS, **fields})
        for name, fields in peer_requests.PARAMETERS.items()
    }
    told = peer_pictures.parameters_of(peer, serving, expected)
    assert told["seed 7"] == told["size"] == told["steps"] == told["guidance"] == "honoured"
    assert told["seed 0"] == "ignored"
    assert told["scheduler"] == "refused (422)"


def test_a_turn_begins_with_a_picture_close_to_the_expected_one(
    peer: Peer, serving: Serving
) -> None:
    fields = {**peer_requests.DEFAULTS, "seed": 7}
    close = picture_of(fields)
    close.putpixel((0, 0), (0, 0, 0))
    away = peer_pictures.difference_of(peer, serving, {"seed 7": close})
    assert away == pytest.approx(255 / 512**2)
    with pytest.raises(PeerError, match="another picture"):
        peer_pictures.difference_of(peer, serving, {"seed 7": picture_of({**fields, "seed": 9})})


def test_both_mixes_ask_for_the_same_every_time() -> None:
    first, again = peer_requests.mixes(60), peer_requests.mixes(60)
    assert first == again
    assert tuple(first) == peer_requests.MIXES
    assert len({request["height"] for request in first["three classes"]}) == 3
    settings = [
        (request["height"], request["num_inference_steps"], request["guidance_scale"])
        for request in first["all different"]
    ]
    assert len(set(settings)) > 50
    sides = {
        request[side] for mix in first.values() for request in mix for side in ("height", "width")
    }
    assert sides == set(peer_requests.SIDES_PX)


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
    assert [(peer.name, peer.precision) for peer in PEERS if peer.name == "ours"] == [
        (PEERS[0].name, "float32"),
        (PEERS[len(PEERS) // 2].name, "bfloat16"),
    ]
    assert len({peer_systems.slug(peer.title) for peer in PEERS}) == len(PEERS)


def test_a_part_has_the_turns_that_it_needs() -> None:
    def turns(*parts: str) -> list[str]:
        return [peer.title for peer in peers.chosen(["ours", "LitServe"], parts)]

    assert turns("float32") == ["ours in float32", "LitServe in float32"]
    assert turns("fastest") == ["LitServe in float32", "ours in bfloat16", "LitServe in bfloat16"]
    assert turns("float32", "fastest") == ["ours in float32", *turns("fastest")]


def test_rounds_begin_with_different_turns_and_have_all() -> None:
    orders = [peers.turns(PEERS, number, 3) for number in (1, 2, 3)]
    assert orders[0] == list(PEERS)
    assert len({order[0].title for order in orders}) == 3
    assert all({peer.title for peer in order} == {peer.title for peer in PEERS} for order in orders)


def test_pictures_count_by_their_part_in_the_window() -> None:
    size = {"height": 64, "width": 64}
    fields = {"num_inference_steps": 10, "guidance_scale": 4.0, **size}
    fine, black = png_of(picture_of(fields)), png_of(Image.new("RGB", (64, 64)))
    long = {**fields, "num_inference_steps": 50}
    start_s = peers.FILL_S
    replies = [
        peers.Reply(fields, 0.0, start_s - 1, fine),
        peers.Reply(fields, start_s, start_s + 2, fine),
        peers.Reply(long, 0.0, start_s + 9, fine),
        peers.Reply(fields, start_s, start_s + 3, black),
        peers.Reply({**fields, "width": 32}, start_s, start_s + 3, fine),
        peers.Reply(fields, start_s, start_s + 3, b"<html>"),
        peers.Reply(fields, start_s, start_s + 3, b"", "503"),
        peers.Reply(fields, start_s, start_s + 11, fine),
    ]
    measured = peers.Measured()
    peers.add(replies, "mix", 10.0, measured)
    assert measured.images_per_s == {"mix": [pytest.approx((1 + 9 / 17 + 10 / 11) / 10)]}
    assert measured.errors == {"one colour": 1, "another size": 1, "no picture": 1, "503": 1}
    assert 7.0 < measured.short_p95_s["mix"][0] <= 11.0


@pytest.mark.parametrize("begins_s", [-3.0, 0.0, 1.0])
def test_where_a_batch_ends_in_the_window_changes_no_rate(begins_s: float) -> None:
    fields = {"num_inference_steps": 10, "height": 64, "width": 64}
    content = png_of(picture_of({**fields, "guidance_scale": 4.0}))
    starts_s = [peers.FILL_S + begins_s + 4.0 * number for number in range(-2, 8)]
    replies = [
        peers.Reply(fields, start_s, start_s + 4.0, content)
        for start_s in starts_s
        for _ in range(8)
    ]
    measured = peers.Measured()
    peers.add(replies, "mix", 10.0, measured)
    assert measured.images_per_s["mix"] == [pytest.approx(2.0)]


def measured(rates: list[float], p95_s: list[float]) -> peers.Measured:
    return peers.Measured({"mix": rates}, {"mix": p95_s}, parameters={"seed 7": "honoured"})


def test_figures_hold_ours_against_each_other_by_round() -> None:
    figures = peers.figures_of(
        {
            "float32": {
                "ours": measured([4.0, 6.0], [1.0, 1.0]),
                "other": measured([2.0, 2.0], [4.0, 5.0]),
                "absent": peers.Measured(failure="not installed: …"),
            },
            "bfloat16": {},
        }
    )
    by_name = {figure.name: figure for figure in figures}
    assert by_name["mix: ours / other"].value.values == (2.0, 3.0)
    assert by_name["mix: p95 of short requests, ours / other"].value.values == (0.25, 0.2)
    assert not any("absent" in name or "max" in name for name in by_name)


def test_at_its_fastest_each_other_has_the_precision_in_which_it_draws_more() -> None:
    figures = peers.figures_of(
        {
            "float32": {
                "ours": measured([1.0, 1.0], [1.0, 1.0]),
                "slower in halves": measured([4.0, 2.0], [2.0, 2.0]),
                "quicker in halves": measured([1.0, 1.0], [2.0, 2.0]),
                "black in halves": measured([1.0, 1.0], [2.0, 2.0]),
            },
            "bfloat16": {
                "ours": measured([8.0, 8.0], [1.0, 1.0]),
                "slower in halves": measured([1.0, 4.5], [9.0, 9.0]),
                "quicker in halves": measured([2.0, 4.0], [4.0, 4.0]),
                "black in halves": measured([0.0, 0.0], [9.0, 9.0]),
            },
        }
    )
    values = {figure.name: figure.value.values for figure in figures}
    fastest = {name: each for name, each in values.items() if "speed max / " in name}
    assert fastest == {
        "mix: ours, speed max / slower in halves in float32": (2.0, 4.0),
        "mix: p95 of short requests, ours, speed max / slower in halves in float32": (0.5, 0.5),
        "mix: ours, speed max / quicker in halves in bfloat16": (4.0, 2.0),
        "mix: p95 of short requests, ours, speed max / quicker in halves in bfloat16": (0.25, 0.25),
        "mix: ours, speed max / black in halves in float32": (8.0, 8.0),
        "mix: p95 of short requests, ours, speed max / black in halves in float32": (0.5, 0.5),
    }
    assert values["mix: ours / slower in halves"] == (0.25, 0.5)
