"""Compiled and captured forwards of a denoiser, prepared in warm-up and never in traffic.

Calls of a kind that was warmed up run the prepared code; every other call runs the forward as it
is. Two calls are of one kind when they differ in nothing but their rows and their values::

    warming up   new kind ─▶ compile for any rows ─▶ capture one CUDA graph a bucket ─▶ compare
    in traffic   known kind ─▶ the bucket's graph, or the compiled code      else ─▶ as it is
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from handler.batching.arguments import STEP_PARAMETERS, num_rows
from handler.batching.devices import moved
from handler.batching.invariance import agree
from handler.batching.merging import merge
from handler.engine.forward import is_out_of_memory

__all__ = ["Forward", "PreparedForward", "Recorder", "record_cuda_graph"]

logger = logging.getLogger(__name__)

Forward = Callable[..., Any]

Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], object], Any]]
"""Records what a function does to fixed memory: how to do it again, and where the result lies."""

# Of a row's own spread: enough for rows that are mixed up or stale to show in the comparison.
_NOISE = 0.5


@dataclass(frozen=True, slots=True)
class _Call:
    """A call in the one form that prepared code knows: steps a row each, tensors without gaps."""

    arguments: dict[str, Any]
    rows: int
    kind: Hashable
    """What it has in common with calls of other rows and values."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> _Call | None:
        """None for a call that has no such form."""
        rows = num_rows(arguments)
        if not rows:
            return None
        device = next(tensor.device for tensor in _tensors(arguments) if tensor.ndim)
        plain = {n: _one_form(n, value, rows, device) for n, value in arguments.items()}
        leaves, structure = pytree.tree_flatten(plain)
        kind = (structure, tuple(_kind_of(leaf, rows) for leaf in leaves))
        try:
            hash(kind)
        except TypeError:
            return None
        return cls(plain, rows, kind)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return _tensors(self.arguments)

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The arguments with these in the places of its own."""
        leaves, structure = pytree.tree_flatten(self.arguments)
        following = iter(tensors)
        replaced = [next(following) if isinstance(v, torch.Tensor) else v for v in leaves]
        arguments: dict[str, Any] = pytree.tree_unflatten(replaced, structure)
        return arguments


class PreparedForward:
    """Runs `forward`, prepared for the kinds of calls that it sees while `is_warming`.

    Args:
        forward: the denoiser's own forward; what everything is compared with and falls back to.
        buckets: rows to be ready for.
        compiler: makes faster code of a forward, for any number of rows above one.
        record: records a run for each of `buckets`; None: nothing is recorded.
        precision: what the forward computes in, where that is not its result's dtype.
    """

    def __init__(
        self,
        forward: Forward,
        buckets: Sequence[int],
        *,
        compiler: Callable[[Forward], Forward] | None = None,
        record: Recorder | None = None,
        precision: torch.dtype | None = None,
    ) -> None:
        self.is_warming = False
        self.num_prepared_runs = 0
        self.num_plain_runs = 0
        self._forward = forward
        self._signature = inspect.signature(forward)
        self._compiler = compiler
        self._compiled: Forward | None = None
        self._record = record
        self._precision = precision
        self._buckets = sorted(buckets, reverse=True)
        self._seen: set[Hashable] = set()
        self._kinds: dict[Hashable, Forward] = {}
        self._replays: dict[tuple[Hashable, int], _Replay] = {}

    @property
    def function(self) -> Forward:
        """This forward as a function with the name and the signature of the real one."""

        @functools.wraps(self._forward)
        def prepared(*args: Any, **kwargs: Any) -> Any:
            return self(*args, **kwargs)

        return prepared

    @property
    def has_graphs(self) -> bool:
        """Whether runs were recorded."""
        return bool(self._replays)

    def forget_graphs(self) -> None:
        """Give the memory of the recorded runs back, and record no more."""
        self._replays.clear()
        self._record = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the forward returns, from prepared code where there is any for this call."""
        call = _Call.of(self._signature.bind(*args, **kwargs).arguments)
        if call is not None and self.is_warming and call.kind not in self._seen:
            self._seen.add(call.kind)
            self._prepare(call)
        if call is not None:
            replay = self._replays.get((call.kind, call.rows))
            if replay is not None:
                self.num_prepared_runs += 1
                return replay(call.tensors)
            code = self._kinds.get(call.kind)
            # A single row is a special case that compilers make other code for.
            if code is not None and call.rows > 1:
                self.num_prepared_runs += 1
                return self._run(code, call.arguments)
        self.num_plain_runs += 1
        return self._forward(*args, **kwargs)

    def _prepare(self, call: _Call) -> None:
        """Compile, record and compare; whatever goes wrong, that kind of call stays as it is."""
        try:
            if self._compiler is not None:
                self._compile(call, self._compiler)
        except Exception as error:
            logger.warning("not compiled, forwards run as they are: %s", _first_line(error))
        try:
            if self._record is not None:
                self._capture(call, self._record)
        except Exception as error:
            for rows in self._buckets:
                self._replays.pop((call.kind, rows), None)
            logger.warning("not captured, forwards are launched as usual: %s", _first_line(error))

    def _compile(self, call: _Call, compiler: Callable[[Forward], Forward]) -> None:
        fitting = [rows for rows in self._buckets if rows >= max(2, call.rows)]
        largest, smallest = _resized(call, fitting[0]), _resized(call, fitting[-1])
        for tensor in largest.tensors:
            if tensor.ndim and tensor.shape[0] == largest.rows:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        if self._compiled is None:
            self._compiled = compiler(self._forward)
        code = self._compiled
        self._call(code, largest.arguments)
        with torch.compiler.set_stance("fail_on_recompile"):
            for sample in (largest, smallest):
                self._compare(functools.partial(self._call, code), sample)
        self._kinds[call.kind] = code

    def _capture(self, call: _Call, record: Recorder) -> None:
        """Record the largest first: the memory that it takes is enough for the others."""
        code = self._kinds.get(call.kind, self._forward)
        for rows in self._buckets:
            if rows < call.rows:
                break
            try:
                sample = _resized(call, rows)
                replay = _Replay(sample, functools.partial(self._run, code), record)
                self._compare(lambda arguments: replay(_tensors(arguments)), sample)  # noqa: B023
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("no memory to capture forwards of %d rows", rows)
            else:
                self._replays[call.kind, rows] = replay

    def _call(self, code: Forward, arguments: Mapping[str, Any]) -> Any:
        bound = inspect.BoundArguments(self._signature, OrderedDict(arguments))
        return code(*bound.args, **bound.kwargs)

    def _run(self, code: Forward, arguments: Mapping[str, Any]) -> Any:
        """Run `code`; where it would have to be compiled anew, the forward as it is."""
        if code is self._forward:
            return self._call(code, arguments)
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._call(code, arguments)

    def _compare(self, run: Callable[[dict[str, Any]], Any], call: _Call) -> None:
        """Run twice on noise: the second result must not be the first's, nor change it.

        Raises:
            ValueError: it is not what the forward computes.
        """
        noisy = [call.with_tensors([_noisy(t) for t in call.tensors]) for _ in range(2)]
        results = [run(arguments) for arguments in noisy]
        for arguments, result in zip(noisy, results, strict=True):
            if not agree(result, self._call(self._forward, arguments), self._precision):
                raise ValueError(f"other results at {call.rows} rows than the forward as it is")


class _Replay:
    """One recorded run: values go into its inputs, and copies of its results come out."""

    def __init__(self, call: _Call, run: Callable[[dict[str, Any]], Any], record: Recorder) -> None:
        self._inputs = [tensor.clone() for tensor in call.tensors]
        arguments = call.with_tensors(self._inputs)
        self._play, self._output = record(lambda: run(arguments))

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Any:
        for place, tensor in zip(self._inputs, tensors, strict=True):
            place.copy_(tensor)
        self._play()
        # The next replay writes over its results, while a request may keep them for many steps.
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, self._output)


def record_cuda_graph() -> Recorder:
    """A recorder of CUDA graphs that share one pool of memory: only one of them runs at a time."""
    pool: Any = torch.cuda.graph_pool_handle()

    def record(run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        # Libraries allocate and choose their kernels in the first runs, which no graph may hold.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = run()
        return graph.replay, output

    return record


def _tensors(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(dict(arguments))
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _one_form(name: str, value: Any, rows: int, device: torch.device) -> Any:
    """`value` as prepared code gets it, however a pipeline or a merged batch wrote it.

    Pipelines pass one step for all rows and merged batches one a row, some schedulers count steps
    in integers and some do not; a batch has gaps where a pipeline took a part of a larger tensor.
    """
    is_step = name in STEP_PARAMETERS and isinstance(value, torch.Tensor) and value.ndim <= 1
    if is_step and value.numel() in (1, rows):
        value = moved(value.to(torch.float32), device).reshape(-1).expand(rows)
    return pytree.tree_map_only(torch.Tensor, _without_gaps, value)


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    strides, length = [], 1
    for size in reversed(tensor.shape):
        strides.append(length)
        length *= max(size, 1)
    # `is_contiguous` overlooks the strides of dimensions of one; guards of compiled code do not.
    if tensor.stride() == tuple(reversed(strides)):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _kind_of(leaf: Any, rows: int) -> Hashable:
    if not isinstance(leaf, torch.Tensor):
        return (type(leaf), leaf)
    has_rows = leaf.ndim > 0 and leaf.shape[0] == rows
    return (leaf.dtype, leaf.device, has_rows, tuple(leaf.shape[has_rows:]))


def _resized(call: _Call, rows: int) -> _Call:
    """A call of the same kind with `rows` rows, the last of its own repeated."""
    resized = _Call.of(merge([call.arguments], [call.rows], pad_to=rows))
    if resized is None or resized.kind != call.kind or resized.rows != rows:
        raise ValueError(f"calls of this kind cannot have {rows} rows")
    return resized


def _noisy(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` with noise; steps and whole numbers as they are."""
    if not tensor.is_floating_point() or tensor.ndim <= 1:
        return tensor.clone()
    values = tensor.float()
    noise = torch.randn_like(values) * values.std() * _NOISE
    return (values + noise).to(tensor.dtype)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
