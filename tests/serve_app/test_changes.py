"""Changes of a Serve config file: what Serve takes, what is left alone, when one is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rayseek.cluster.config import Config
from rayseek.serve_app.changes import Changes, ServeApi, settled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Api(ServeApi):
    """Says of every file that it is in force."""

    def __init__(self, counts: dict[str, int]) -> None:
        self.files: list[dict[str, Any]] = []
        self._counts = counts

    def deploy(self, file: Any) -> None:
        from ray.serve.schema import ServeDeploySchema

        ServeDeploySchema.model_validate(file)
        self.files.append(file)

    def application(self) -> dict[str, Any]:
        counts = dict(self._counts)
        for entry in self.files[-1]["applications"][0].get("deployments", ()) if self.files else ():
            scaling = entry.get("autoscaling_config", {})
            counts[entry["name"]] = entry.get(
                "num_replicas", scaling.get("min_replicas", counts[entry["name"]])
            )
        return {
            "status": "RUNNING",
            "deployments": {
                name: {
                    "status": "HEALTHY",
                    "replicas": [
                        {"replica_id": f"{name}{len(self.files)}.{i}", "state": "RUNNING"}
                        for i in range(count)
                    ],
                }
                for name, count in counts.items()
            },
        }


def changes(tmp_path: Path) -> tuple[Api, Changes]:
    from rayseek.serve_app.application import serve_config

    config = Config.model_validate(
        {
            "model": {"path": str(tmp_path)},
            "api": {"keys": ["sk-a"]},
            "prefill": {"units": 1},
            "decode": {"experts": "dedicated", "expert_ranks": 2},
            "autoscaling": {"prefill": {"least": 1, "most": 3}},
        }
    )
    api = Api({"Prefill": 1, "Decode": 1, "Experts": 2, "Ingress": 1})
    return api, Changes(api, config, serve_config(config))


def test_every_deployment_is_updated_alone_and_then_all(tmp_path: Path) -> None:
    api, made = changes(tmp_path)
    done = [made.update(1) for _ in range(6)]
    assert done == [
        *(f"update {n}" for n in ("Prefill", "Decode", "Experts", "Ingress", "everything")),
        "update Prefill",
    ]
    args = [file["applications"][0]["args"] for file in api.files]
    assert args[0] == args[3] != args[4] == args[5]
    entries = [{e["name"]: e for e in file["applications"][0]["deployments"]} for file in api.files]
    for before, after, name in zip(entries, entries[1:], ("Decode", "Experts", "Ingress"),
                                   strict=False):  # fmt: skip
        assert {n for n in after if after[n] != before.get(n)} == {name}
    assert entries[5]["Prefill"] != entries[0]["Prefill"]


def test_only_an_update_of_all_is_other_code_to_serve(tmp_path: Path) -> None:
    """Else Serve would replace every replica where one deployment changes."""
    from ray.serve._private.deploy_utils import get_app_code_version
    from ray.serve.schema import ServeDeploySchema

    api, made = changes(tmp_path)
    first = made.file
    for make in (made.scale, made.scale, *[made.update] * 5):
        make(1)
    codes = [
        get_app_code_version(ServeDeploySchema.model_validate(file).applications[0])
        for file in (first, *api.files)
    ]
    assert len(set(codes[:-1])) == 1 and codes[-1] != codes[0]


def test_numbers_go_up_and_down_within_the_ranges(tmp_path: Path) -> None:
    _, made = changes(tmp_path)
    assert [made.scale(1) for _ in range(5)] == [
        f"scale {what}"
        for what in ("Prefill to 3", "Experts to 3", "Prefill to 1", "Experts to 2", "Prefill to 3")
    ]


@pytest.mark.parametrize(
    ("change", "over"),
    [
        ({}, True),
        ({"status": "DEPLOYING"}, False),
        ({"deployments": {}}, False),
        ({"replicas": [{"replica_id": "old", "state": "RUNNING"}]}, False),
        ({"replicas": [{"replica_id": "new", "state": "STOPPING"}]}, False),
        ({"replicas": [{"replica_id": "new", "state": "RUNNING"}] * 2}, False),
    ],
)
def test_a_change_is_over_when_nothing_old_is_left(change: dict[str, Any], over: bool) -> None:
    replicas = change.pop("replicas", [{"replica_id": "new", "state": "RUNNING"}])
    application = {
        "status": "RUNNING",
        "deployments": {"Decode": {"status": "HEALTHY", "replicas": replicas}},
        **change,
    }
    assert settled(application, ["old"], {"Decode": 1}) == over


def test_serve_tells_what_is_looked_at() -> None:
    from ray.serve.schema import ApplicationDetails, DeploymentDetails, ReplicaDetails

    assert {"status", "message", "deployments"} <= ApplicationDetails.model_fields.keys()
    assert {"status", "message", "replicas"} <= DeploymentDetails.model_fields.keys()
    assert {"replica_id", "state"} <= ReplicaDetails.model_fields.keys()
