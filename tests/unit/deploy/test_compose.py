"""deploy/compose.yaml: the services and ports that the documentation promises."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.support.ssh_launch import ROOT


def substituted(text: str) -> str:
    """Every ${NAME:-default} by its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.fixture
def services() -> dict[str, Any]:
    content = yaml.safe_load(substituted((ROOT / "deploy/compose.yaml").read_text()))
    assert isinstance(content, dict)
    services = content["services"]
    assert isinstance(services, dict)
    return services


def test_ports_are_those_of_the_documentation_and_of_this_machine_only(services: dict[str, Any]) -> None:
    ports = {name: service["ports"] for name, service in services.items()}
    assert ports == {
        "etcd": ["127.0.0.1:2379:2379"],
        "jaeger": ["127.0.0.1:4317:4317", "127.0.0.1:4318:4318", "127.0.0.1:16686:16686"],
    }


def test_every_service_has_a_pinned_image_and_a_health_check(services: dict[str, Any]) -> None:
    for service in services.values():
        image, _, tag = service["image"].partition(":")
        assert "." not in image.split("/")[0], "short names, without the host of a registry"
        assert re.match(r"\d+\.\d+\.\d+", tag)
        assert service["healthcheck"]["test"][0] == "CMD"
