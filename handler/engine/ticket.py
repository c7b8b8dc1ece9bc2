"""A ticket: one drawing inside the engine, its state, its times, and how it ended."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from greenlet import greenlet

from handler.engine.shortcuts import NONE, Shortcuts
from handler.pipelines.adapters import AdapterSet
from handler.pipelines.cost import Cost
from handler.pipelines.prompt_embeddings import PromptReading

__all__ = ["State", "StepEnd", "Ticket", "release_frames"]

_serial_numbers = itertools.count()


class State(Enum):
    """Where a ticket is; it leaves the first two exactly once, to one of the others."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class StepEnd:
    """What an `on_step` callback is told after each denoising step.

    `step` counts from 1. `latents` are the pipeline's own, at this step: (B, C, H/8, W/8) for most
    families, packed for some; None where the pipeline does not tell. Read them, do not keep them.
    """

    step: int
    num_steps: int | None
    latents: torch.Tensor | None


@dataclass(eq=False)
class Ticket:
    """One submitted call of a pipeline; ask for its `result` once it is `ended`."""

    kwargs: dict[str, Any]
    cost: Cost
    task: str = ""
    """The name of the engine's pipeline that draws it."""
    pipeline: Any = None
    is_exclusive: bool = False
    """Whether it changes the shared modules while it runs, so that no other may run beside it."""
    seed: int | None = None
    """Of its own generator, from which torch's global ones are seeded too; None: it has none."""
    scheduler: Any = None
    deadline: float | None = None
    exact: bool = False
    adapter_set: AdapterSet | None = None
    """LoRAs with their scales, and what they add to which layers; None: those active at first."""
    on_step: Callable[[StepEnd], None] | None = None
    prompts: PromptReading | None = None
    """How its prompts are read; None: as the pipeline does."""
    shortcuts: Shortcuts = NONE
    """What is not computed for it."""

    serial: int = field(default_factory=lambda: next(_serial_numbers))
    state: State = State.WAITING
    overtaken: int = 0
    last_tick: int = -1
    num_steps_done: int = 0
    num_steps: int | None = None

    submitted_s: float = 0.0
    admitted_s: float | None = None
    denoising_s: float | None = None
    """When the denoiser was called for it first."""
    denoised_s: float | None = None
    ended_s: float | None = None

    memory: dict[Hashable, Any] = field(default_factory=dict)
    """What forward wrappers remember of this ticket, each under its own key; freed at its end."""

    # The engine's own, while the ticket is alive.
    run: greenlet | None = None
    view: Any = None
    """The pipeline's own copy that draws it, once it runs."""
    random_states: list[torch.Tensor] | None = None
    cancelling: BaseException | None = None
    _outcome: Any = None

    @property
    def ended(self) -> bool:
        """Whether it is done or failed, for good."""
        return self.state in (State.DONE, State.FAILED)

    @property
    def lora_names(self) -> frozenset[str]:
        """The LoRAs that it draws with, where it names any."""
        return frozenset(() if self.adapter_set is None else self.adapter_set.weights or ())

    @property
    def error(self) -> BaseException | None:
        """Why it failed; None while it lives and when it succeeded."""
        return self._outcome if self.state is State.FAILED else None

    def result(self) -> Any:
        """What the pipeline's ``__call__`` returned.

        Raises:
            RuntimeError: it has not ended yet.
            BaseException: what the pipeline raised; `Cancelled` or `DeadlineExceeded` if so ended.
        """
        if not self.ended:
            raise RuntimeError(
                f"request {self.serial} is still {self.state.value}; step the engine"
            )
        if self.state is State.FAILED:
            raise self._outcome
        return self._outcome

    def end(self, state: State, outcome: Any, now_s: float) -> None:
        """Move to `state` for good and release everything that the run needed."""
        assert not self.ended, "a ticket ends once"
        self.state, self._outcome, self.ended_s = state, outcome, now_s
        self.kwargs = {}
        self.memory = {}
        self.adapter_set = self.view = None
        self.scheduler = self.on_step = self.run = self.cancelling = self.random_states = None


def release_frames(error: BaseException) -> None:
    """Empty the frames that `error` came through: its traceback keeps the lines, not the tensors.

    Else the latents of a failed request would stay for as long as anybody keeps its error. To be
    called where `error` is caught: that frame itself is left out.
    """
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        link = pending.pop()
        if link is not None and id(link) not in seen:
            seen.add(id(link))
            traceback.clear_frames(link.__traceback__)
            pending += [link.__cause__, link.__context__]
