"""Everything one coordinator process needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvrelay import default_addresses
from kvrelay.coordinator.cluster_engine import ClusterEngineConfig
from kvrelay.coordinator.connection_limits import ConnectionLimits
from kvrelay.coordinator.front_end import FrontEndConfig
from kvrelay.coordinator.http_serving import ServingOptions
from kvrelay.coordinator.request_limits import RequestLimits
from kvrelay.coordinator.scheduler.cost_config import CostConfig
from kvrelay.heartbeat import HeartbeatConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    coordinator_id: str
    etcd: Sequence[str]
    """host:port of every member."""
    cluster: str = "default"
    http_listen: str = default_addresses.HTTP
    """host:port of the OpenAI API; port 0 takes a free one."""
    grpc_listen: str = default_addresses.GRPC
    """host:port of the Inference service; port 0 takes a free one."""
    shares_ports: bool = False
    """Other replicas listen at the same two addresses, so this one has two of its own besides."""
    advertise_host: str | None = None
    """Name under which others reach this process; where it listens when None."""
    front_end: FrontEndConfig
    policy: str = "cost"
    """How workers are chosen: a name of `scheduler.policies.POLICIES`."""
    cost: CostConfig = field(default_factory=CostConfig)
    engine: ClusterEngineConfig = field(default_factory=ClusterEngineConfig)
    limits: RequestLimits = field(default_factory=RequestLimits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    serving: ServingOptions = field(default_factory=ServingOptions)
    """Templates and parsers of the OpenAI API."""
    max_queued_messages: int = 4096
    """Messages that may wait for one worker's stream."""
    heartbeat: HeartbeatConfig = field(default_factory=HeartbeatConfig)
    """On the streams to workers."""
    otlp_endpoint: str | None = None
    log_format: str = "console"
    log_level: str = "info"
    etcd_history_s: float | None = 600.0
    """How much of etcd's history is kept by the coordinator that leads; None leaves that to etcd."""
    drain_s: float = 5.0
    """How long leaving and requests may go on after SIGTERM, all together."""
