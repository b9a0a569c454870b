"""cluster.yaml: what is served, by how many replicas, on which addresses.

`load_config` reports everything that is wrong with a file at once, each with file, line, field and what was expected.
Sizes are bytes, times seconds.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic import WithJsonSchema as JsonSchema

from flm.cluster.settings.adapter_fields import AdapterFields
from flm.cluster.settings.hardware import NodeSpec
from flm.cluster.settings.names import Name
from flm.cluster.settings.prompt_fields import PromptFields
from flm.cluster.settings.quantization import Quantization
from flm.cluster.settings.units import Bytes
from flm.cluster.settings.yaml_source import (
    ConfigErrors,
    YamlSource,
    from_validation,
    known_keys,
    parse_yaml,
)
from flm.worker.errors import ConfigError
from flm.worker.limits import HANG_TIMEOUT

DRAIN_TIMEOUT = 30.0  # seconds for a replica's streams, unless the file says otherwise
MAX_REPLICAS = 1024  # of one model: a guard against slips of the finger


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, numbers in quotes too, and nothing changes afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _listen(value: str) -> str:
    host, separator, port = value.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"expected host:port with a port from 1 to 65535, got {value!r}")
    return value


def _ray_address(value: str) -> str:
    return value if value in ("local", "auto") else _listen_or(value, "local, auto or host:port")


def _listen_or(value: str, expected: str) -> str:
    try:
        return _listen(value)
    except ValueError:
        raise ValueError(f"expected {expected}, got {value!r}") from None


def is_loopback(listen: str) -> bool:
    """Whether a valid host:port can be reached from this machine only."""
    host = listen.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


Listen = Annotated[str, AfterValidator(_listen)]


class RaySection(Section):
    """Where Ray is. local: a head of our own on this machine; auto or host:port: a cluster that runs already."""

    address: Annotated[str, AfterValidator(_ray_address)] = "local"


class TlsSection(Section):
    """Paths of PEM files."""

    cert_file: str
    key_file: str


class GatewaySection(Section):
    """The public port. One that other machines can reach needs api_keys or tls, or insecure: true. `replica_wait`: for
    how long a request without a deadline waits for a replica of its model to be ready; with 0 none does."""

    listen: Listen = "127.0.0.1:50051"
    api_keys: list[Annotated[str, Field(min_length=8)]] = []
    tls: TlsSection | None = None
    insecure: bool = False
    replica_wait: Annotated[float, Field(ge=0, le=86400)] = 30.0


class AdminSection(Section):
    """The operators' port. One that other machines can reach needs api_keys, or insecure: true."""

    listen: Listen = "127.0.0.1:50052"
    api_keys: list[Annotated[str, Field(min_length=8)]] = []
    insecure: bool = False


def _kv_memory(value: object) -> object:
    return 0 if value == "auto" else value


class KvCacheSection(Section):
    """The paged KV cache of each rank: `memory` is its most bytes; 0, written auto: 1 GiB on CPUs, on GPUs all that weights
    and workspace leave."""

    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8"] = "auto"
    memory: Annotated[Bytes, BeforeValidator(_kv_memory)] = 0


class Replicas(Section):
    """How many replicas to start with, and between which bounds `scale` may move them."""

    start: int
    min: int
    max: int


def _replicas(value: object) -> object:
    expected = f"expected a number of replicas from 0 to {MAX_REPLICAS}, or {{min: 1, max: 4}}"
    if type(value) is int and 0 <= value <= MAX_REPLICAS:
        return Replicas(start=value, min=0, max=MAX_REPLICAS)
    if isinstance(value, dict) and set(value) == {"min", "max"}:
        low, high = value["min"], value["max"]
        if type(low) is int and type(high) is int and 0 <= low <= high <= MAX_REPLICAS and high > 0:
            return Replicas(start=low, min=low, max=high)
    if isinstance(value, Replicas):
        return value
    raise ValueError(f"{expected}, got {value!r}")


_REPLICAS_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0, "maximum": MAX_REPLICAS},
        {
            "type": "object",
            "properties": {
                "min": {"type": "integer", "minimum": 0},
                "max": {"type": "integer", "minimum": 1},
            },
            "required": ["min", "max"],
            "additionalProperties": False,
        },
    ],
    "default": 1,
}


class ModelSection(Section, AdapterFields, PromptFields):
    """One served model. Zeros of max_context and threads mean: the checkpoint's own; an equal share of the cores."""

    name: Name
    path: Annotated[str, Field(min_length=1)]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel: Annotated[int, Field(ge=1, le=1024)] = 1
    expert_parallel: bool = False
    replicas: Annotated[Replicas, BeforeValidator(_replicas), JsonSchema(_REPLICAS_SCHEMA)] = Replicas(
        start=1, min=0, max=MAX_REPLICAS
    )
    quantization: Quantization = "auto"
    activations: Literal["auto", "bfloat16", "float16"] = "auto"
    matmul: Literal["exact", "cublas"] = "exact"
    generation_config: Literal["auto", "none"] = "auto"
    kv_cache: KvCacheSection = KvCacheSection()
    max_context: Annotated[int, Field(ge=0)] = 0
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 64
    max_step_tokens: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    max_queue: Annotated[int, Field(ge=0)] = 256
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    gpu_memory: Annotated[float, Field(ge=0.1, le=1.0)] = 0.92
    drain_timeout: Annotated[float, Field(ge=0, le=86400)] = DRAIN_TIMEOUT
    hang_timeout: Annotated[float, Field(ge=1, le=3600)] = HANG_TIMEOUT


class ClusterConfig(Section):
    """All of cluster.yaml."""

    name: Name
    ray: RaySection = RaySection()
    gateway: GatewaySection = GatewaySection()
    admin: AdminSection = AdminSection()
    models: Annotated[list[ModelSection], Field(min_length=1)]
    hardware: list[NodeSpec] = []

    def model_named(self, name: str) -> ModelSection:
        return next(model for model in self.models if model.name == name)


def load_config(path: str | Path) -> ClusterConfig:
    """Read and check a file. ConfigError (ConfigErrors where there are several) says everything that is wrong."""
    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"expected a readable YAML file: {reason}", file=file) from None
    return parse_config(text, file)


def parse_config(text: str, file: str) -> ClusterConfig:
    """The config in `text`. `file` names it in errors, and relative model paths start from its folder."""
    source = parse_yaml(text, file)
    if not isinstance(source.data, dict):
        raise ConfigError("expected a mapping with name and models", file=file, line=1)
    errors = list(source.errors)
    config: ClusterConfig | None = None
    try:
        config = ClusterConfig.model_validate(source.data)
    except ValidationError as error:
        errors += from_validation(source, error, known_keys(ClusterConfig))
    errors += _cross_checks(source)
    if errors:
        raise ConfigErrors(sorted(errors, key=lambda e: e.line)) if len(errors) > 1 else errors[0]
    assert config is not None
    return _with_absolute_paths(config, Path(file).absolute().parent)


def _with_absolute_paths(config: ClusterConfig, folder: Path) -> ClusterConfig:
    def absolute(path: str) -> str:
        return path if path.startswith("package:") else str(folder / Path(path).expanduser())

    def of_model(model: ModelSection) -> ModelSection:
        adapters = {n: a.model_copy(update={"path": absolute(a.path)}) for n, a in model.adapters.items()}
        return model.model_copy(update={"path": absolute(model.path), "adapters": adapters})

    update: dict[str, Any] = {"models": [of_model(model) for model in config.models]}
    if config.gateway.tls is not None:  # read by the gateway and by later commands, from other folders
        files = {key: absolute(path) for key, path in config.gateway.tls}
        tls = config.gateway.tls.model_copy(update=files)
        update["gateway"] = config.gateway.model_copy(update={"tls": tls})
    return config.model_copy(update=update)


Found = TypeVar("Found", bound=Section)


def _section(kind: type[Found], data: dict[Any, Any], name: str) -> Found | None:
    """A section by itself, so that checks across fields run even where another section is wrong."""
    try:
        return kind.model_validate(data.get(name, {}))
    except ValidationError:
        return None


def _cross_checks(source: YamlSource) -> list[ConfigError]:
    """Rules over more than one field."""
    errors, data = [], source.data
    gateway, admin = _section(GatewaySection, data, "gateway"), _section(AdminSection, data, "admin")
    reachable = "is reachable from other machines; expected a loopback address, {}, or insecure: true"
    if gateway and not (is_loopback(gateway.listen) or gateway.api_keys or gateway.tls or gateway.insecure):
        errors.append(
            source.error(("gateway", "listen"), f"{gateway.listen} {reachable.format('api_keys, tls')}")
        )
    if admin and not (is_loopback(admin.listen) or admin.api_keys or admin.insecure):
        errors.append(source.error(("admin", "listen"), f"{admin.listen} {reachable.format('api_keys')}"))
    if gateway and admin and gateway.listen == admin.listen:
        here, other = "admin", "gateway"
        if (here, "listen") not in source.lines:
            here, other = other, here  # the file's own line is the one to change
        message = f"expected another address than {other}.listen, {admin.listen}"
        errors.append(source.error((here, "listen"), message))
    models = data.get("models")
    names: dict[object, int] = {}
    for index, model in enumerate(models if isinstance(models, list) else []):
        name = model.get("name") if isinstance(model, dict) else None
        if isinstance(name, str) and name in names:
            errors.append(
                source.error(
                    ("models", index, "name"),
                    f"expected a name of its own, {name!r} is models[{names[name]}] already",
                )
            )
        elif isinstance(name, str):
            names[name] = index
    return errors


def json_schema() -> dict[str, Any]:
    """The JSON schema of cluster.yaml, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | ClusterConfig.model_json_schema()
