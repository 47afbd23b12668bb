"""What commands of this folder read, and a server that makes changes of the file system fail."""

from __future__ import annotations

import pytest
from helpers.kill import make_inputs


@pytest.fixture(scope="session")
def safety_folder(tmp_path_factory, server):
    """Has `in`, which commands read."""
    folder = tmp_path_factory.mktemp("safety")
    make_inputs(folder / "in", server)
    return folder


@pytest.fixture(scope="session")
def faults(server):
    """The server, where it can make changes of the file system fail."""
    if server.library is None:
        pytest.skip("changes of the file system are counted by a library, which needs cc")
    return server
