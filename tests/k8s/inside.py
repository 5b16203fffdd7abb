"""What runs in the sandbox of test_confined.py: Ray as KubeRay starts it, the Serve config as its
operator submits it, its probes, one chat request. The last line that it prints is a JSON object."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

TOKEN = "0123456789abcdef" * 4
PROBES = (  # of workers with and without ranks, by KubeRay and by us
    "wget --tries 1 -T 10 -q -O- http://localhost:52365/api/local_raylet_healthz",
    "wget --tries 1 -T 10 -q -O- http://localhost:52365/api/healthz",
    "wget --tries 1 -T 10 -q -O- http://localhost:8000/-/healthz",
)
FOLDERS = ("/", "/etc", "/opt", "/usr", "/var")
LIMIT_S = 900.0


def main() -> None:
    serve, key = json.loads(sys.argv[1]), sys.argv[2]
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    started = "ulimit -n 65536; exec ray start --head --block --num-cpus=4 --num-gpus=0 " \
        "--object-store-memory=100000000 --dashboard-host=0.0.0.0 --metrics-export-port=8080 " \
        "--dashboard-agent-listen-port=52365 --node-ip-address=127.0.0.1"  # fmt: skip
    ray = subprocess.Popen(["bash", "-c", started], stdout=sys.stderr)
    deploy(serve)
    body = {"model": "deepseek-v3", "messages": [{"role": "user", "content": "Hi"}]}
    answer = json.loads(
        patiently("http://localhost:8000/v1/chat/completions", key, "POST", body | {"seed": 1})
    )
    found = {
        "user": os.getuid(),
        "answer": answer["choices"][0]["message"]["content"],
        "refused": [folder for folder in FOLDERS if not writable(folder)],
        "probes": [
            subprocess.run(p.split(), capture_output=True, text=True, check=False).stdout.strip()
            for p in PROBES
        ],
        "strays": strays(),
        "written": {
            folder: sorted(p.name for p in Path(folder).glob("*"))
            for folder in ("/tmp", "/cache", os.environ["HOME"])
        },
    }
    assert ray.poll() is None
    print(json.dumps(found), flush=True)


def deploy(serve: object) -> None:
    patiently("http://localhost:8265/api/serve/applications/", TOKEN, "PUT", serve)


def patiently(url: str, key: str, method: str, body: object) -> bytes:
    """Ask until it answers."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    deadline, problem = time.monotonic() + LIMIT_S, ""
    while time.monotonic() < deadline:
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                found: bytes = answer.read()
                return found
        except OSError as error:
            problem = str(error)
            time.sleep(1)
    raise SystemExit(f"{url}: {problem}")


def writable(folder: str) -> bool:
    with contextlib.suppress(OSError):
        file = Path(folder) / "stray"
        file.touch()
        file.unlink()
        return True
    return False


def strays() -> list[str]:
    """Files on the root's own file system: none was there at the start."""
    root, found = os.stat("/").st_dev, []
    for folder, folders, names in os.walk("/"):
        folders[:] = [f for f in folders if os.lstat(Path(folder) / f).st_dev == root]
        found += [str(Path(folder) / name) for name in names]
    return [path for path in found if not os.path.islink(path) and os.lstat(path).st_dev == root]


if __name__ == "__main__":
    main()
