"""The LoRAs that requests may name: those packed, and files of a folder, read at first use.

A file is read, checked and put where the weights are in a thread; between two ticks the engine is
only told its name. Those that were not asked for the longest make room for others, but never one
that a request in flight draws with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from handler.api.lora_names import is_lora_name, lora_problem
from handler.api.request import GenerationRequest
from handler.engine import InFlightEngine
from handler.errors import ArchiveError, InvalidRequest, QueueFull
from handler.pipelines.adapters import PreparedLora

__all__ = ["LoraNames", "LoraShelf", "named_by"]

_SUFFIX = ".safetensors"

_SWITCH_S = 5e-5

_Layers = Mapping[str, Mapping[str, Any]]
"""What a LoRA adds to each layer, by component and the layer's path."""


class LoraNames(Collection[str]):
    """The names of the LoRAs that there are now: `packed`, and the files in `folder`."""

    def __init__(self, packed: Collection[str] = (), folder: Path | None = None) -> None:
        self.packed = frozenset(packed)
        self.folder = folder

    def path_of(self, name: str) -> Path | None:
        """The file of a LoRA that is not packed, if there is one."""
        if self.folder is None or not is_lora_name(name) or name in self.packed:
            return None
        path = self.folder / f"{name}{_SUFFIX}"
        return path if path.is_file() else None

    def __contains__(self, name: object) -> bool:
        return name in self.packed or (isinstance(name, str) and self.path_of(name) is not None)

    def __iter__(self) -> Iterator[str]:
        found = set(self.packed)
        if self.folder is not None:
            found.update(path.stem for path in self.folder.glob(f"*{_SUFFIX}") if path.is_file())
        return iter(sorted(name for name in found if is_lora_name(name)))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class LoraShelf:
    """Keeps LoRAs of a folder attached to `engine`, at most `max_loras` of `max_bytes` together.

    `read` opens a file and says what it adds to the pipeline, or raises ArchiveError.
    """

    def __init__(
        self,
        engine: InFlightEngine,
        names: LoraNames,
        read: Callable[[Path], _Layers],
        *,
        max_loras: int,
        max_bytes: int,
    ) -> None:
        self._engine = engine
        self._names = names
        self._read = read
        self._max_loras = max_loras
        self._max_bytes = max_bytes
        self._attached: dict[str, int] = {}
        """The bytes of each; the one asked for last stands last."""
        self._reading = threading.Lock()
        self._read_ones = WeakValueDictionary[tuple[Path, int, int], PreparedLora]()

    def missing(self, requests: Iterable[GenerationRequest]) -> list[str]:
        """The LoRAs that `requests` name and that are to be read first; uses the others.

        Raises:
            InvalidRequest: they name more than there may be at a time.
        """
        wanted = self._wanted(requests)
        if len(wanted) > self._max_loras:
            raise _refused(f"{len(wanted)} are named; max_loras allows {self._max_loras} at a time")
        for name in wanted & self._attached.keys():
            self._attached[name] = self._attached.pop(name)
        return sorted(wanted - self._attached.keys())

    def read(self, names: Iterable[str]) -> dict[str, PreparedLora]:
        """Read LoRAs of the folder and prepare them, in any thread.

        Raises:
            InvalidRequest: a file has gone, or is no LoRA that fits the pipeline.
        """
        found = {}
        for name in names:
            path = self._names.path_of(name)
            if path is None:
                raise _refused(lora_problem([name], self._names) or f"{name} has gone")
            try:
                with self._reading, _switching_often():
                    found[name] = self._prepared(path)
            except (ArchiveError, OSError, ValueError) as error:
                raise _refused(f"{name} cannot be used: {error}") from error
        return found

    def attach(
        self,
        loras: Mapping[str, PreparedLora],
        requests: Iterable[GenerationRequest],
        *,
        wanted: Collection[str] = (),
    ) -> None:
        """Give the engine what was read for `requests`; `wanted` are not to make room for it.

        Raises:
            InvalidRequest: together they are larger than all may be, or the engine does not take
                one.
            QueueFull: all that there is room for are in use.
        """
        named = self._wanted(requests)
        sizes = {name: self._attached[name] for name in named & self._attached.keys()}
        sizes |= {name: lora.size_bytes for name, lora in loras.items()}
        self._check_size(", ".join(sorted(sizes)), sum(sizes.values()), self._max_bytes)
        wanted = {*wanted, *named}
        for name, lora in loras.items():
            if name not in self._attached:
                self._make_room(name, lora.size_bytes, wanted)
                try:
                    self._engine.attach_lora(name, lora)
                except ValueError as error:
                    raise _refused(f"{name} cannot be used: {error}") from error
                self._attached[name] = lora.size_bytes

    def _prepared(self, path: Path) -> PreparedLora:
        """What was read of a file, once for requests that ask for it at the same time."""
        stat = path.stat()
        key = path, stat.st_mtime_ns, stat.st_size
        lora = self._read_ones.get(key)
        if lora is None:
            # It is copied whole. In the layers' precision it may have half of that.
            self._check_size(path.stem, stat.st_size, 2 * self._max_bytes)
            lora = self._engine.prepare_lora(self._read(path))
            after = path.stat()
            if (after.st_mtime_ns, after.st_size) != key[1:]:
                raise ArchiveError("its file is being written; try again a little later")
            self._read_ones[key] = lora
        return lora

    def _wanted(self, requests: Iterable[GenerationRequest]) -> set[str]:
        return named_by(requests) - self._names.packed

    def _check_size(self, name: str, size: int, allowed: int) -> None:
        if size > allowed:
            raise _refused(f"{name}: {size} bytes; max_lora_bytes allows {self._max_bytes}")

    def _make_room(self, name: str, size: int, wanted: Collection[str]) -> None:
        kept = self._engine.loras_in_use | set(wanted)
        free = [each for each in self._attached if each not in kept]
        num_left, bytes_left = len(self._attached), sum(self._attached.values())
        leaving: list[str] = []
        while num_left >= self._max_loras or bytes_left + size > self._max_bytes:
            if not free:
                raise QueueFull(
                    f"{num_left} LoRAs are in use, and there is no room for {name};"
                    " try again a little later"
                )
            leaving.append(free.pop(0))
            num_left, bytes_left = num_left - 1, bytes_left - self._attached[leaving[-1]]
        for each in leaving:
            del self._attached[each]
            self._engine.detach_lora(each)


def named_by(requests: Iterable[GenerationRequest]) -> set[str]:
    """The LoRAs that any of `requests` names."""
    return {name for request in requests for name in request.loras or ()}


@contextmanager
def _switching_often() -> Iterator[None]:
    """Within it, no thread computes in Python for longer than a moment where another one waits.

    The engine's thread asks for the interpreter after each of a forward's hundreds of operations,
    and would wait Python's usual 5 ms for it, every time.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _refused(problem: str) -> InvalidRequest:
    return InvalidRequest(f"loras: {problem}", {"loras": problem})
