"""One fork server for all tests of this folder, and what its commands read."""

from __future__ import annotations

import pytest
from helpers.kill import fork_server


@pytest.fixture(scope="session")
def safety_folder(tmp_path_factory):
    """Has `in`, which commands read."""
    return tmp_path_factory.mktemp("safety")


@pytest.fixture(scope="session")
def server(safety_folder):
    """Runs commands."""
    with fork_server(safety_folder) as server:
        yield server


@pytest.fixture(scope="session")
def faults(server):
    """The server, where it can make changes of the file system fail."""
    if server.library is None:
        pytest.skip("changes of the file system are counted by a library, which needs cc")
    return server
