"""A real sshd for the tests of this room, with a home folder of its own so that nobody's start-up files count."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from jupiter_engine.remote.ssh import SshConnection, connect
from jupiter_engine.settings.cluster import ConnectionSettings
from tests.sshd import Sshd, start_sshd


@pytest.fixture(scope="session")
def sshd_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HOME of every command on `sshd`: a .bashrc put there is read by bash as on any machine."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory, sshd_home: Path) -> Iterator[Sshd]:
    server = start_sshd(tmp_path_factory.mktemp("sshd"), force_env={"HOME": str(sshd_home)})
    yield server
    server.stop()


@pytest.fixture
def settings() -> ConnectionSettings:
    return ConnectionSettings(connect_timeout_s=10)


@pytest.fixture
async def ssh(sshd: Sshd, settings: ConnectionSettings) -> AsyncIterator[SshConnection]:
    connection = await connect(sshd.node(), settings, known_hosts=sshd.trusted(), ssh_config=None)
    yield connection
    await connection.close()
