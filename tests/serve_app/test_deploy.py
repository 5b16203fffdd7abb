"""Where deployments go."""

from pathlib import Path

import pytest

from rayseek.cluster.config import Config
from rayseek.serve_app.settings import ApiSettings


@pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Serve's own
def test_a_local_service_of_several_nodes_keeps_its_ingress_where_its_proxy_is(
    tiny_path: Path,
) -> None:
    from rayseek.serve_app.deploy import build

    settings = ApiSettings("tiny", 512, ("sk-x",))

    def place(head_ingress: bool) -> object:
        app = build(Config(), tiny_path, settings, head_ingress=head_ingress)
        return app._bound_deployment.ray_actor_options.get("resources") or {}

    assert place(head_ingress=False) == {}
    assert place(head_ingress=True) == {"node:__internal_head__": 0.001}
