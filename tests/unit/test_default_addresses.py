"""Whoever starts a coordinator, by whatever means, finds it at the same place."""

from dataclasses import fields

import pytest

from kvrelay import default_addresses
from kvrelay.cli import options
from kvrelay.coordinator.config import CoordinatorConfig
from kvrelay.launch.plan import UpConfig


@pytest.mark.parametrize(
    ("config", "http", "grpc"), [(UpConfig, "http", "grpc"), (CoordinatorConfig, "http_listen", "grpc_listen")]
)
def test_configurations_and_flags_agree(config: type, http: str, grpc: str) -> None:
    defaults = {field.name: field.default for field in fields(config)}
    assert defaults[http] == default_addresses.HTTP == str(options.HTTP)
    assert defaults[grpc] == default_addresses.GRPC == str(options.GRPC)
