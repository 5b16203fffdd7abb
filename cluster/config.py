"""The one config tree. Parsed once at the edge, frozen, each part handed only to its user.

A field exists only if an operator would change it. Unknown fields are errors with their path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self, TypeAlias

import yaml
from pydantic import Field, ValidationError, model_validator

from rayseek.cluster.cell import KubernetesSettings, Section
from rayseek.cluster.scaling_settings import AutoscalingSettings, TimeZone
from rayseek.kernels.kv_format import KVDtype

Role: TypeAlias = Literal["prefill", "decode"]
_SHIPPED = Path(__file__).parent / "configs"


class ModelSettings(Section):
    """Which checkpoint is served, and under which names."""

    path: Path | None = None  # official layout; None: the small one that comes with Rayseek
    name: str = "deepseek-v3"  # `models.data[0].id`
    aliases: tuple[str, ...] = ("deepseek-chat",)  # further names that requests may use


class EngineSettings(Section):
    """One attention rank's engine."""

    max_context: int | None = Field(default=None, ge=64)  # tokens; None: what the model allows
    cache_gib: float = Field(default=0.25, gt=0)  # KV pages of a rank
    max_batch: int = Field(default=64, ge=1)  # sequences running at once
    step_tokens: int = Field(default=1024, ge=1)  # rows of a step that only computes prompts
    chunk_tokens: int = Field(default=256, ge=1)  # prompt rows of a step that also decodes
    draft_tokens: int = Field(default=1, ge=0, le=8)  # most that the MTP module drafts; 0: none
    max_queue: int = Field(default=1024, ge=1)  # waiting requests; one more is refused with 503
    kernels: Literal["auto", "cuda", "native", "reference"] = "auto"
    kv_dtype: KVDtype = "auto"  # of latents; auto: bfloat16, on a CPU float32; fp8: the least bytes
    threads: int = Field(
        default=2, ge=1
    )  # CPU threads of a prompt's big matmuls; decoding uses one
    load_timeout_s: float = Field(
        default=1800, gt=0
    )  # a rank that has not loaded by then is replaced
    step_timeout_s: float = Field(default=60, gt=0)  # a rank whose step takes longer is killed


class UnitSettings(Section):
    """Units of one role: each has attention ranks, and its own copy of every expert."""

    units: int = Field(default=1, ge=1)
    attention_ranks: int = Field(default=1, ge=1)  # of a unit, each with an engine
    experts: Literal["colocated", "dedicated"] = "colocated"  # on these ranks, or on expert ranks
    expert_ranks: int = Field(default=0, ge=0)  # of a unit, with dedicated experts
    redundant_experts: int = Field(default=0, ge=0)  # second copies of a unit, in each layer
    spares: int = Field(default=0, ge=0)  # further expert ranks, to take a dead one's place
    # What differs from `engine` on these units; None: nothing.
    cache_gib: float | None = Field(default=None, gt=0)
    max_batch: int | None = Field(default=None, ge=1)
    step_tokens: int | None = Field(default=None, ge=1)

    @property
    def holders(self) -> int:
        """Ranks of a unit that hold experts."""
        return self.attention_ranks if self.experts == "colocated" else self.expert_ranks

    @model_validator(mode="after")
    def _arrangement(self) -> Self:
        if self.experts == "dedicated" and not self.expert_ranks:
            raise ValueError("experts are dedicated, so expert_ranks must be 1 or more")
        if self.experts == "colocated" and (self.expert_ranks or self.spares):
            raise ValueError(
                "expert_ranks and spares are for dedicated experts; here the attention ranks hold "
                "them (experts: colocated)"
            )
        if self.redundant_experts and self.holders == 1:
            raise ValueError(
                f"redundant_experts is {self.redundant_experts}, but one rank holds all experts: "
                "a second copy beside the first is of no use"
            )
        return self


class PrefillSettings(UnitSettings):
    """Units that compute prompts and hand their pages over. With 0, decode units do it."""

    units: int = Field(default=0, ge=0)


class DecodeSettings(UnitSettings):
    """Units that make tokens."""


class ExchangeSettings(Section):
    """How the ranks of a unit send rows to experts and back, and where the experts are."""

    mode: Literal["auto", "exact", "fixed"] = "auto"  # exact counts, or room for the most
    micro_batches: int = Field(default=1, ge=1, le=2)  # 2: one computes while one is under way
    rebalance_s: float = Field(default=600, ge=0)  # look at the balance so often; 0: never
    rebalance_threshold: float = Field(default=0.05, ge=0)  # part of the experts' time to be won

    @property
    def load_half_life_s(self) -> float:
        """Of the load counters that the balance is judged by."""
        return (self.rebalance_s or 600.0) / 2


class TransferSettings(Section):
    """Handing a prompt's pages over from a prefill unit to a decode unit."""

    min_prompt_tokens: int = Field(default=256, ge=1)  # shorter ones the decode unit computes
    timeout_s: float = Field(default=10, gt=0)  # of silence; then the decode unit computes it


class HardwareSettings(Section):
    """The machines. What is None is what such machines usually have."""

    accelerator: Literal["cpu", "H100", "H200", "H800"] = "cpu"
    per_node: int | None = Field(default=None, ge=1)  # ranks; None: 8, with cpu as many as wanted
    memory_gib: float | None = Field(default=None, gt=0)  # of one rank; None with cpu: not checked

    @property
    def ranks_per_node(self) -> int | None:
        """None: any number."""
        return self.per_node or (None if self.accelerator == "cpu" else 8)

    @property
    def rank_gib(self) -> float | None:
        """Memory that a rank may use; None: unknown."""
        return self.memory_gib or _DEVICE_GIB.get(self.accelerator)


_DEVICE_GIB = {"H100": 79.0, "H800": 79.0, "H200": 139.0}  # what CUDA reports, not the label


class ApiSettings(Section):
    """The HTTP side's behaviour."""

    temperature_mapping: Literal["deepseek", "none"] = "deepseek"  # API 1.0 = model 0.3
    max_output_tokens: int = Field(default=8192, ge=1)  # largest max_tokens
    default_output_tokens: int = Field(default=4096, ge=1)  # when the caller names none
    keys: tuple[str, ...] = ()  # accepted without limits, beside those of the key file
    key_file: Path | None = None  # of `rayseek keys`; None: ~/.config/rayseek/keys.yaml
    # Part of the engine that one key may fill while another asks now and then: lower means quicker
    # first tokens for the other, and less throughput for the one.
    crowd: float = Field(default=0.25, gt=0, le=1)
    max_waiting: int = Field(default=1024, ge=1)  # sequences of one key that may queue; then 503
    shared_cache: bool = False  # keys share computed prompts, and can tell what others' begin with
    body_limit_mib: float = Field(default=8, gt=0)
    keep_alive_s: float = Field(default=10, gt=0)  # a comment line in streams that wait
    ready_window_s: float = Field(default=30, gt=0)  # /ready: a token within this, or a probe
    default_system_prompt: str = "none"  # without one of the caller's: none, deepseek, or a text
    time_zone: TimeZone = "Asia/Shanghai"  # of the date in DeepSeek's system prompt


class PageSettings(Section):
    """The web pages: overview, chat, API reference."""

    default_system_prompt: str = "deepseek"  # the chat page's: none, deepseek, or a text
    public_url: str | None = Field(default=None, pattern=r"^https?://[^\s/]+(/\S*)?$")
    dashboard_url: str | None = Field(default=None, pattern=r"^https?://\S+$")  # None: if known
    local_key: bool = True  # who is on the machine of a loopback-only service sees its key


class IngressSettings(Section):
    """Where the API listens, and how many processes speak it."""

    host: str = "0.0.0.0"
    port: int = Field(default=8000, ge=1, le=65535)
    grpc_port: int | None = Field(default=None, ge=1, le=65535)  # the gRPC front door; None: off
    replicas: int = Field(default=1, ge=1)  # keep it stable: a change reloads the proxy
    longest_stream_s: int = Field(
        default=7200, ge=1
    )  # streams live this long through reloads and updates


class TraceSettings(Section):
    """OpenTelemetry spans of requests (cluster/traces.py)."""

    # a collector's, OTLP over HTTP; None: the environment's OTEL_EXPORTER_OTLP_ENDPOINT, if any
    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")


class Config(Section):
    """Everything `rayseek serve` can be told."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    exchange: ExchangeSettings = ExchangeSettings()
    transfer: TransferSettings = TransferSettings()
    hardware: HardwareSettings = HardwareSettings()
    api: ApiSettings = ApiSettings()
    pages: PageSettings = PageSettings()
    ingress: IngressSettings = IngressSettings()
    traces: TraceSettings = TraceSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()

    @property
    def units(self) -> dict[Role, UnitSettings]:
        """The roles that there are units of."""
        of: dict[Role, UnitSettings] = {"prefill": self.prefill, "decode": self.decode}
        return {role: settings for role, settings in of.items() if settings.units}

    def engine_of(self, role: Role) -> EngineSettings:
        """The engine of an attention rank of this role."""
        unit = self.prefill if role == "prefill" else self.decode
        own = {name: getattr(unit, name) for name in ("cache_gib", "max_batch", "step_tokens")}
        changes = {name: value for name, value in own.items() if value is not None}
        return self.engine.model_copy(update=changes)

    @model_validator(mode="after")
    def _scales(self) -> Self:
        for role, unit in (("prefill", self.prefill), ("decode", self.decode)):
            widest = self.autoscaling.widest(role)
            if widest and not widest.least <= unit.units <= widest.most:
                raise ValueError(
                    f"{role}.units is {unit.units}, outside autoscaling.{role} "
                    f"({widest.least} to {widest.most}); units start with that many"
                )
        experts = self.autoscaling.experts
        if experts and not experts.least <= self.decode.expert_ranks <= experts.most:
            raise ValueError(
                f"decode.expert_ranks is {self.decode.expert_ranks}, outside autoscaling.experts "
                f"({experts.least} to {experts.most}); only dedicated experts scale by themselves"
            )
        if experts and experts.least < self.decode.expert_ranks:
            raise ValueError(
                f"autoscaling.experts.least is {experts.least}, fewer than decode.expert_ranks "
                f"({self.decode.expert_ranks}), which a unit must have"
            )
        return self

    @model_validator(mode="after")
    def _scalable(self) -> Self:
        settings = self.autoscaling
        if "kueue" in self.kubernetes.components and (
            settings.prefill or settings.decode or settings.experts
        ):
            raise ValueError(
                "kubernetes.components has kueue, which refuses clusters that scale: take it away, "
                "or the ranges in autoscaling"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        per_node = self.hardware.ranks_per_node
        for role, unit in self.units.items():
            engine = self.engine_of(role)
            if engine.chunk_tokens > engine.step_tokens:
                raise ValueError(
                    f"engine.chunk_tokens ({engine.chunk_tokens}) must not exceed "
                    f"step_tokens ({engine.step_tokens} in {role} units)"
                )
            ranks = unit.attention_ranks
            if per_node and ranks > per_node and ranks % per_node:
                raise ValueError(
                    f"{role}.attention_ranks is {ranks}: more than one node of {per_node}, so it "
                    f"must fill whole nodes, as {ranks - ranks % per_node} would"
                )
        return self


class ConfigFileError(ValueError):
    """A config file that cannot be used; the message lists every problem with its path."""


def shipped_configs() -> list[str]:
    """The names that `load_config` knows."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def load_config(source: str | Path) -> Config:
    """Read a YAML config: a file that ends in .yaml or .yml, or the name of a shipped one.

    Raises ConfigFileError.
    """
    path = Path(source)
    if path.suffix not in {".yaml", ".yml"}:
        if str(source) not in shipped_configs():
            raise ConfigFileError(
                f"{source}: neither a .yaml file nor one of {', '.join(shipped_configs())}"
            )
        path = _SHIPPED / f"{source}.yaml"
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigFileError(f"{path}: {error}") from None
    try:
        return Config.model_validate(data or {})
    except ValidationError as error:
        words = {"extra_forbidden": "unknown key"}
        problems = [
            f"  {'.'.join(map(str, e['loc'])) or 'config'}: "
            + words.get(e["type"], e["msg"].removeprefix("Value error, "))
            for e in error.errors()
        ]
        raise ConfigFileError("\n".join([f"{path}:", *problems])) from None
