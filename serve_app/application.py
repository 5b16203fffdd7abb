"""What `serve deploy` builds on a cluster: the application from the args of a Serve config file.

`rayseek config render` writes such a file. On one machine `rayseek serve` does it all instead.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from rayseek.cluster.autoscaling import autoscaling_policy, replica_ranges, serve_scaling
from rayseek.cluster.config import Config
from rayseek.cluster.layout import layout
from rayseek.model.config import ModelConfig
from rayseek.model.official import DEEPSEEK_V3
from rayseek.serve_app.deploy import APP_NAME, build
from rayseek.serve_app.grpc_door import SERVICER_FUNCTIONS
from rayseek.serve_app.ingress import api_settings
from rayseek.serve_app.keys import KeyRing


def application(args: dict[str, Any]) -> Application:
    """Serve's builder; `args` are a config's keys.

    Raises ValidationError for a wrong key, ConfigError or ValueError if the model or the API's keys
    are not there.
    """
    from rayseek.cluster.build import engine_limits  # torch: not in the command that renders

    config = Config.model_validate(args)
    path = _shared_model(config)
    context = engine_limits(ModelConfig.from_pretrained(path), config.engine_of("decode")).context
    file = config.api.key_file
    if not len(KeyRing(config.api.keys, file)):
        raise ValueError(f"no API keys: neither api.keys nor api.key_file ({file}) has one")
    return build(config, path, api_settings(config, context, file, None), scaled=True)


def serve_config(config: Config) -> dict[str, Any]:
    """The Serve config file of a cluster, checked by Serve's own schema.

    Raises ValueError if the cluster's processes could not find model and keys.
    """
    _shared_model(config)
    if not config.api.keys and config.api.key_file is None:
        raise ValueError(
            "api.key_file is not set: a file of `rayseek keys` that all nodes can read"
        )
    file: dict[str, Any] = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.ingress.host, "port": config.ingress.port},
    }
    if config.ingress.grpc_port is not None:
        file["grpc_options"] = {
            "port": config.ingress.grpc_port,
            "grpc_servicer_functions": SERVICER_FUNCTIONS,
        }
    file["applications"] = [
        {
            "name": APP_NAME,
            "route_prefix": "/",
            "import_path": f"{__name__}:{application.__name__}",
            "args": config.model_dump(mode="json", exclude_defaults=True, exclude={"kubernetes"}),
        }
    ]
    if policy := autoscaling_policy(config):
        ranges = replica_ranges(config)
        file["applications"][0]["autoscaling_policy"] = policy
        # First named by a later file, they would look like other code, and all would be replaced.
        file["applications"][0]["deployments"] = [
            {"name": d.name, "autoscaling_config": serve_scaling(ranges[d.name], d.replicas)}
            for d in layout(config, DEEPSEEK_V3).deployments  # the same for a smaller model
            if d.name in ranges
        ]
    # Serve deprecates metrics_interval_s, but reads nothing else in its place.
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        ServeDeploySchema.model_validate(file)
    return file


def _shared_model(config: Config) -> Path:
    if config.model.path is None or not config.model.path.is_absolute():
        raise ValueError(
            f"model.path is {config.model.path}: give the absolute path of a checkpoint folder "
            "that all nodes of the cluster can read"
        )
    return config.model.path
