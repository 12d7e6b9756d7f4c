"""The processes of a run as torch.distributed knows them: who this one is, and how all agree on something.

`ALONE` is one process, without torch. The others of a run are told of every error, so that none waits for ever
(`watch.py`); what is spread over them, and how, is a layout's (`ddp.py`, `zero1.py`, ...).
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from tunesmith.core import errors
from tunesmith.core.errors import DivergedError, PeerError, Stopped, TunesmithError
from tunesmith.parallel.watch import Watch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tunesmith.parallel.traffic import Traffic

T = TypeVar("T")
# what torch and its backends say when a peer is gone; they raise plain RuntimeErrors
_LOST = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|TCPStore", re.I)
_OF_STEPS = ("all_reduce", "reduce_scatter", "all_gather", "activations")  # not small messages, and not checkpoints
PATIENCE_SECONDS = 12.0  # for the reason of a failure to become known
# a peer that is gone is found by `watch.py`; a collective only waits for what takes long, as judging on one process
LONGEST = timedelta(hours=6)


class Alone:
    """One process."""

    rank, size, is_first = 0, 1, True

    def sums(self, values: Sequence[float]) -> list[float]:
        """The sum over processes, number by number."""
        return list(values)

    def most(self, value: float) -> float:
        """The largest over processes."""
        return self.largest([value])[0]

    def largest(self, values: Sequence[float]) -> list[float]:
        """The same number by number."""
        return list(values)

    def first(self, made: Callable[[], T]) -> T:
        """What the first process makes, JSON; its errors are everybody's."""
        return made()

    def in_turn(self, made: Callable[[], T]) -> T:
        """What each process makes, the first one before all others; its errors are everybody's."""
        return made()

    def named(self, text: str) -> str:
        """A text of every process, for a message that all say."""
        return text

    def total(self) -> dict[str, Any]:
        """The same since this process began."""
        return {}

    def told(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """The facts of every process, by rank."""
        return [facts]

    def same(self, tensors: Iterable[Tensor]) -> None:
        """Gives all processes the first one's tensors, in place."""

    def sent(self) -> dict[str, Any]:
        """What this process has sent since it was asked before, and how long that took, for a record of a step."""
        return {}


ALONE = Alone()


class World(Alone):
    """The processes of a run; `joined` makes one.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        device: where small messages lie: the CPU, or the accelerator of a backend that knows no other.
        traffic: what is sent.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, watch: Watch, traffic: Traffic | None = None
    ) -> None:
        from tunesmith.parallel.traffic import Traffic

        self.rank, self.size, self.device, self.watch = rank, size, device, watch
        self.is_first = rank == 0
        self.traffic = traffic or Traffic(size)

    def within(self, group: Any) -> World:
        """Some of the processes, this one among them: a group of torch.distributed as a world of its own."""
        import torch.distributed as dist

        from tunesmith.parallel.traffic import Traffic

        rank, size = dist.get_rank(group), dist.get_world_size(group)
        return World(rank, size, self.device, self.watch, Traffic(size, group, self.traffic))

    def sums(self, values: Sequence[float]) -> list[float]:
        import torch

        held = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        self.traffic.all_reduce(held, kind="control")
        found: list[float] = held.tolist()
        return found

    def largest(self, values: Sequence[float]) -> list[float]:
        import torch
        import torch.distributed as dist

        held = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        self.traffic.all_reduce(held, dist.ReduceOp.MAX, kind="control")
        found: list[float] = held.tolist()
        return found

    def first(self, made: Callable[[], T]) -> T:
        answer: dict[str, Any] = {}
        if self.is_first:
            try:
                answer = {"made": made()}
            except TunesmithError as error:
                answer = {"error": [type(error).__name__, error.message, error.where, error.hint, error.exit_code]}
                self._tell(json.dumps(answer))
                raise
        answer = json.loads(self._tell(json.dumps(answer)))
        if "error" in answer:
            raise _told(*answer["error"])
        found: T = answer["made"]
        return found

    def in_turn(self, made: Callable[[], T]) -> T:
        kept: list[T] = []
        self.first(lambda: kept.append(made()))
        return kept[0] if kept else made()

    def named(self, text: str) -> str:
        told = [(rank, self._tell(text, rank)) for rank in range(self.size)]
        return "; ".join(f"rank {rank}: {words}" for rank, words in told if words)

    def told(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        return [json.loads(self._tell(json.dumps(facts), rank)) for rank in range(self.size)]

    def same(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.traffic.broadcast(tensor, 0)

    def sent(self) -> dict[str, Any]:
        return _sent(*self.traffic.take())

    def total(self) -> dict[str, Any]:
        return _sent(self.traffic.sent_bytes, self.traffic.seconds)

    def _tell(self, text: str, source: int = 0) -> str:
        """One process's text, in all."""
        import torch

        raw = text.encode()
        length = torch.tensor([len(raw)], dtype=torch.int64, device=self.device)
        self.traffic.broadcast(length, source)
        if not int(length):
            return ""
        held = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            held.copy_(torch.frombuffer(bytearray(raw), dtype=torch.uint8))
        self.traffic.broadcast(held, source)
        return bytes(held.tolist()).decode()


@contextmanager
def joined(rank: int, size: int) -> Iterator[World]:
    """The world of this process, for as long as the block runs. The environment is torchrun's.

    An error in the block is told to the others. Raises PeerError where another process has failed.
    """
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
        backend, device = "cpu:gloo,cuda:nccl", torch.device("cpu")
    else:
        backend, device = "gloo", torch.device("cpu")
    store, _, _ = next(dist.rendezvous("env://", rank, size))
    # torchrun keeps its store over restarts, and with it the addresses of processes that are gone
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    watch = Watch(dist.PrefixStore(f"watch/{attempt}", store.clone()), rank, size)
    group = dist.PrefixStore(f"group/{attempt}", store)
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=LONGEST)
    watch.start()
    world = World(rank, size, device, watch)
    try:
        yield world
    except (DivergedError, Stopped) as error:
        error.is_told = not world.is_first  # all have found this out together
        raise
    except TunesmithError as error:
        if not error.is_told:
            watch.tell(error.message)
        raise
    except Exception as error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            _stay()
            raise PeerError(PeerError.told(watch.reason(PATIENCE_SECONDS)), hint=PeerError.HINT) from error
        watch.tell(f"{type(error).__name__}: {error}")
        raise
    except BaseException as error:
        watch.tell(f"stopped ({type(error).__name__})")
        raise
    finally:
        watch.close()
        if dist.is_initialized():
            dist.destroy_process_group()


def _stay() -> None:
    """Lets this process end by what it knows: torchrun terminates all others when one has failed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _sent(sent: dict[str, int], seconds: float) -> dict[str, Any]:
    return {
        "sent_bytes": sum(count for kind, count in sent.items() if kind in _OF_STEPS),
        **{f"{kind}_sent_bytes": count for kind, count in sorted(sent.items())},
        "communication_seconds": round(seconds, 6),
    }


def _told(kind: str, message: str, where: str, hint: str, exit_code: int) -> TunesmithError:
    """The first process's error in another one, which need not say it again."""
    error: TunesmithError = getattr(errors, kind)(message, where=where, hint=hint)
    error.exit_code, error.is_told = exit_code, True
    return error
