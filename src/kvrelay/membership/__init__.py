"""Who belongs to the cluster: records in etcd, each under the lease of the process that it describes."""

from kvrelay.membership.election import LeadershipLostError, campaign
from kvrelay.membership.follow import Members, follow_coordinators, follow_workers
from kvrelay.membership.records import (
    chores_key,
    coordinator_key,
    coordinators_prefix,
    list_coordinators,
    list_workers,
    prefix_delta_key,
    prefix_logs_prefix,
    worker_key,
    workers_prefix,
)
from kvrelay.membership.registration import Registration, register

__all__ = [
    "LeadershipLostError",
    "Members",
    "Registration",
    "campaign",
    "chores_key",
    "coordinator_key",
    "coordinators_prefix",
    "follow_coordinators",
    "follow_workers",
    "list_coordinators",
    "list_workers",
    "prefix_delta_key",
    "prefix_logs_prefix",
    "register",
    "worker_key",
    "workers_prefix",
]
