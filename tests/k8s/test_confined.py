"""A pod's container as the manifests make it: uid 1000, a read-only root, nothing to write to but
the volumes of `cpu-smoke`. Ray, Serve, HAProxy and the engine start in it and answer.

About a minute, so only with `pytest --full`. Bubblewrap plays the container runtime; the image's
files are this machine's, in another place.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rayseek.model.shipped import SHIPPED
from rayseek.serve_app.k8s.yaml_text import read

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
OVERLAY = ROOT / "k8s/overlays/cpu-smoke/rayservice.yaml"
PROBED = ["success", "raylet: success\ngcs: success", "success"]
ETC = ("passwd", "group", "hosts", "nsswitch.conf", "alternatives", "ld.so.cache", "ssl")
INSIDE = Path(__file__).with_name("inside.py")


def sandbox(pod: dict[str, Any], secrets: dict[str, Path], model: str) -> list[str]:
    """Bubblewrap's command line for a pod's first container. secrets: of volumes, by name."""
    (container, *_), volumes = pod["containers"], {v["name"]: v for v in pod["volumes"]}
    user = str(pod["securityContext"]["runAsUser"])
    line = ["bwrap", "--unshare-all", "--die-with-parent", "--uid", user, "--gid", user,
            "--cap-drop", "ALL", "--clearenv", "--setenv", "PATH",
            f"{Path(sys.executable).parent}:/usr/bin:/bin"]  # fmt: skip
    for entry in container["env"]:
        line += ["--setenv", entry["name"], entry["value"]]
    line += ["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "lib", "lib64", "sbin"):
        if Path(f"/{name}").is_symlink():
            line += ["--symlink", str(Path(f"/{name}").readlink()), f"/{name}"]
    for folder in {sys.prefix, sys.base_prefix, str(ROOT), str(INSIDE.parent)}:
        line += ["--ro-bind", folder, folder]
    for name in ETC:
        line += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    line += ["--ro-bind", str(SHIPPED), model]
    for mount in container["volumeMounts"]:
        volume, path = volumes[mount["name"]], mount["mountPath"]
        if "emptyDir" in volume:
            line += ["--tmpfs", path]
        else:
            line += ["--ro-bind", str(secrets[mount["name"]]), path]
    return [*line, "--remount-ro", "/", "--chdir", "/home/rayseek"]


def test_the_service_starts_confined(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    if not pytestconfig.getoption("--full") or shutil.which("bwrap") is None:
        pytest.skip("only with --full, and bubblewrap")
    (cell,) = read(OVERLAY.read_text())
    (serve,) = read(cell["spec"]["serveConfigV2"])
    # All in one pod here, so no deployment is bound to the pods of a group.
    del serve["applications"][0]["deployments"]
    head = cell["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]
    from rayseek.serve_app.keys import add_key

    key = add_key(tmp_path / "keys.yaml", "me")
    model = serve["applications"][0]["args"]["model"]["path"]
    line = sandbox(head, {"keys": tmp_path}, model)
    done = subprocess.run(
        [*line, sys.executable, str(INSIDE), json.dumps(serve), key],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["user"] == 1000 and said["refused"] == ["/", "/etc", "/opt", "/usr", "/var"]
    assert said["answer"] and said["probes"] == PROBED
    assert not said["strays"], "written outside the volumes"
