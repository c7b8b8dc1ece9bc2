"""gateway.picture_store: names nobody guesses, and nothing that stays for good."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.picture_store import PictureStore, StoreFull


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(folder: Path, clock: Clock, *, max_bytes: int = 1000) -> PictureStore:
    return PictureStore(folder / "pictures", 60.0, max_bytes, clock)


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "pictures").iterdir()}


def test_a_picture_is_there_until_it_expires(tmp_path: Path, clock: Clock) -> None:
    async def check() -> None:
        kept = store(tmp_path, clock)
        name = await kept.add(b"picture", "png")
        assert len(name) >= 36
        clock.now_s += 59
        kept.sweep()
        assert await kept.get(name) == b"picture"
        clock.now_s += 1
        assert await kept.get(name) is None
        assert files(tmp_path) == set()

    asyncio.run(check())


def test_what_nobody_fetches_is_deleted_in_time(tmp_path: Path, clock: Clock) -> None:
    async def check() -> None:
        kept = store(tmp_path, clock)
        await kept.add(b"old", "png")
        clock.now_s += 30
        young = await kept.add(b"young", "webp")
        clock.now_s += 30
        kept.sweep()
        assert files(tmp_path) == {young}

    asyncio.run(check())


def test_the_oldest_make_room(tmp_path: Path, clock: Clock) -> None:
    async def check() -> None:
        kept = store(tmp_path, clock, max_bytes=10)
        names = [await kept.add(b"1234", "png") for _ in range(3)]
        assert files(tmp_path) == set(names[1:])
        assert await kept.get(names[0]) is None
        with pytest.raises(StoreFull):
            await kept.add(b"12345678901", "png")
        assert files(tmp_path) == set(names[1:])

    asyncio.run(check())


def test_a_gateway_that_starts_again_knows_them(tmp_path: Path, clock: Clock) -> None:
    async def check() -> None:
        first = store(tmp_path, clock)
        expired = await first.add(b"expired", "png")
        clock.now_s += 30
        alive = await first.add(b"alive", "png")
        (tmp_path / "pictures" / "half.png.part").touch()
        (tmp_path / "pictures" / "mine.txt").touch()
        clock.now_s += 30
        again = store(tmp_path, clock)
        assert await again.get(alive) == b"alive"
        assert await again.get(expired) is None
        assert files(tmp_path) == {alive, "mine.txt"}

    asyncio.run(check())


@pytest.mark.parametrize("name", ["", "..", "../keys", "a.png", "x" * 32 + ".txt", "mine.txt"])
def test_no_other_file_is_given(tmp_path: Path, clock: Clock, name: str) -> None:
    kept = store(tmp_path, clock)
    (tmp_path / "pictures" / "mine.txt").write_text("secret")
    (tmp_path / "keys").write_text("secret")
    assert asyncio.run(kept.get(name)) is None


def test_its_files_are_private(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock)
    name = asyncio.run(kept.add(b"picture", "jpeg"))
    assert (tmp_path / "pictures").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "pictures" / name).stat().st_mode & 0o777 == 0o600
