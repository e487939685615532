"""A real etcd and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from kvrelay.etcd import EtcdClient, EtcdConfig, connect
from tests.support.etcd_process import EtcdProcess, etcd_process


@pytest_asyncio.fixture
async def etcd() -> AsyncIterator[EtcdProcess]:
    async with etcd_process() as process:
        yield process


@pytest_asyncio.fixture
async def client(etcd: EtcdProcess) -> AsyncIterator[EtcdClient]:
    async with connect(EtcdConfig(endpoints=[etcd.endpoint])) as client:
        yield client
