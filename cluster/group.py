"""The members of one epoch, able to exchange tensors: a process group without global state.

Gloo on a CPU, NCCL between GPUs. A group fails as a whole: when one member dies or closes it, all
who stand in an exchange learn it at once, and nobody can use it again. So there is nothing to
repair: whoever cannot go on closes its end, and a new epoch makes a new group. NCCL tells only of
members behind a network; of a GPU beside it, a waiting member learns by asking `over`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore, Work
from torch.distributed import DistStoreError

from rayseek.cluster.precedence import giving_way

CONNECT_S = 2.0
"""Gloo waits five times as long for a member that dies while all connect, and cannot be told
otherwise; so members first wait for each other at the store, then connect within this."""
LOOK_UP = timedelta(seconds=0.25)

# Torch would note the stack of whoever starts an exchange, for a report that nobody reads here.
os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "0")
SPIN_S, POLL_S = 1e-3, 5e-5  # a GPU's exchange is looked for at once, and after a while so often


GIVEN_UP = "it stood still, and the group has been given up"


class ExchangeBroken(RuntimeError):
    """The group is of no use any more; the message says where that was noticed, and why."""


class Transfer:
    """A started exchange; keeps its tensors alive until it has ended."""

    __slots__ = ("_group", "_tensors", "_work", "what")

    def __init__(self, group: Group, work: Work, what: str, tensors: tuple[Tensor, ...]) -> None:
        self._group, self._work, self.what, self._tensors = group, work, what, tensors

    def wait(self, on_device: bool = False) -> None:
        """Block until it is done. The current CUDA stream may use it then.

        on_device: on CUDA only the stream waits, as a graph must; nobody learns of a failure.
        """
        try:
            self._group.wait(self._work, on_device)
        except RuntimeError as error:
            raise ExchangeBroken(f"{self.what}: {_first_line(error)}") from error


class Group:
    """Member `rank` of `size`, met through a key-value store: a connection nobody else uses now.

    prefix: the same for all members, new for every epoch. timeout_s: how long an exchange, or the
    forming, may take. device: "cpu", or the "cuda" device of this process. given_up: asked while
    members are missing; true ends the waiting, for they will not come. over: likewise, asked in an
    exchange that stands still; then somebody hangs in it. address: of this member, for gloo to
    listen on; None: whatever its host's name means. Blocks until all are there; raises
    ExchangeBroken if they are not in time.
    """

    def __init__(
        self,
        store: Store,
        prefix: str,
        rank: int,
        size: int,
        timeout_s: float,
        device: torch.device | str = "cpu",
        given_up: Callable[[], bool] = lambda: False,
        over: Callable[[], bool] | None = None,
        address: str | None = None,
    ) -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self._group: Any = None
        self._over, self._stuck, self._limit_s = over, False, timeout_s
        limit = timedelta(seconds=timeout_s)
        try:
            keys = PrefixStore(prefix, store)
            keys.set(f"here/{rank}", "")
            _wait_for([f"here/{member}" for member in range(size)], keys, limit, given_up)
            if self.device.type == "cpu":
                gloo: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
                gloo._timeout = timedelta(seconds=CONNECT_S)
                # Woken in the middle of a send, its network thread would interrupt the worker that
                # sends, want the lock which that one holds, and spin until its time slice ends.
                with giving_way():
                    gloo._devices = [
                        ProcessGroupGloo.create_device(hostname=address)
                        if address
                        else ProcessGroupGloo.create_default_device()
                    ]
                    self._group = ProcessGroupGloo(keys, rank, size, gloo)
                self._group._set_default_timeout(limit)
            else:
                from torch._C._distributed_c10d import ProcessGroupNCCL  # not in CPU builds

                options = ProcessGroupNCCL.Options()
                options._timeout = limit
                self._group = ProcessGroupNCCL(keys, rank, size, options)
        except RuntimeError as error:
            raise ExchangeBroken(
                f"forming group {prefix} as member {rank} of {size}: {_first_line(error)}"
            ) from error

    def all_to_all(
        self,
        out: Tensor,
        source: Tensor,
        out_splits: Sequence[int],
        splits: Sequence[int],
        what: str = "exchange",
    ) -> Transfer:
        """Send splits[m] rows of `source` to each member m and get out_splits[m] rows from it.

        Rows are along the first dimension, back to back in member order; every member must start
        the same exchanges in the same order. what: names it in an ExchangeBroken.
        """
        if self._group is None:
            raise ExchangeBroken(f"{what}: this member has left the group")
        try:
            work = self._group.alltoall_base(out, source, list(out_splits), list(splits))
        except RuntimeError as error:
            raise ExchangeBroken(f"{what}: {_first_line(error)}") from error
        return Transfer(self, work, what, (out, source))

    def wait(self, work: Work, on_device: bool = False) -> None:
        """RuntimeError if it fails, or if the group is over meanwhile."""
        if self.device.type != "cpu" and not on_device:
            self._poll(work)
        if self.device.type != "cpu" or self._over is None:
            work.wait()
            return
        while True:
            try:
                work.wait(LOOK_UP)
                return
            except RuntimeError:
                if work.is_completed():
                    work.wait()  # for it may have been done just now
                    return
                if self._over():
                    self._stuck = True
                    raise RuntimeError(GIVEN_UP) from None

    def _poll(self, work: Work) -> None:
        """NCCL's own wait is for the stream only. The host would stand still where it next reads
        a value, with nobody to tell it of a death, and an aborted exchange would leave it rubbish.
        """
        since = time.monotonic()
        while not work.is_completed():
            waited = time.monotonic() - since
            if self._over is not None and self._over():
                raise RuntimeError(GIVEN_UP)
            if waited > self._limit_s:
                raise RuntimeError(f"it stood still for {waited:.0f} s")
            time.sleep(0 if waited < SPIN_S else POLL_S)

    def all_gather(self, values: Sequence[int]) -> list[tuple[int, ...]]:
        """A few integers of every member, in member order; blocks."""
        mine = torch.tensor([list(values)] * self.size, dtype=torch.int64, device=self.device)
        every, ones = torch.empty_like(mine), [1] * self.size
        self.all_to_all(every, mine, ones, ones, "agreement").wait()
        return [tuple(row) for row in every.tolist()]

    def close(self, flush: bool = False) -> None:
        """Leave: closes the connections, which ends the group for all members. Idempotent.

        flush: all leave, and what is still on its way to others must arrive: NCCL would drop it.
        """
        left, self._group = [self._group], None
        if self.device.type != "cpu" and left[0] is not None:
            if flush:
                with contextlib.suppress(RuntimeError):  # somebody died just now
                    left[0].shutdown()
                    return
            left[0].abort()  # ends kernels that wait for a member that is dead
        if self._stuck:  # closing waits for the one who hangs, and nobody should wait for that
            threading.Thread(target=left.clear, name="stuck-group", daemon=True).start()
            self._stuck = False


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """A connection to the store that another process offers. Raises ExchangeBroken.

    It can take seconds where the names of addresses resolve badly: both ends look each other's up.
    Who makes many groups connects once.
    """
    try:
        return TCPStore(host, port, None, False, timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise ExchangeBroken(f"store {host}:{port}: {_first_line(error)}") from error


def open_store(host: str) -> TCPStore:
    """A key-value store of this process, on a free port of this address only."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _wait_for(
    names: list[str], keys: Store, limit: timedelta, given_up: Callable[[], bool]
) -> None:
    """Until all these keys are set. DistStoreError when they are not in time, or it is given up."""
    deadline = time.monotonic() + limit.total_seconds()
    while True:
        try:
            return keys.wait(names, LOOK_UP)
        except DistStoreError:
            if given_up() or time.monotonic() > deadline:
                raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
