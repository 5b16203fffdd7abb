"""What the workers of a run share: sums over all of them. One worker shares with nobody."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange(Protocol):
    rank: int
    workers: int

    def add(self, tensor: Tensor) -> None:
        """Replace the tensor, in place, by its sum over all workers."""


class Alone:
    rank, workers = 0, 1

    def add(self, tensor: Tensor) -> None:
        del tensor


class Group:
    """The workers of the default process group of torch.distributed."""

    def __init__(self) -> None:
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()

    def add(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)


def join(rank: int, workers: int, file: str) -> Group:
    """Meet the other processes of this machine through a file that does not exist yet."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=workers)
    torch.distributed.barrier()
    return Group()
