"""One thread per test process: the models are tiny, and two processes share two cores. Models of
several files.
"""

import os
import shutil
import subprocess
import sys

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"  # as the command line has it before libraries are imported

import pytest  # noqa: E402  # the variables must be set before torch is imported

pytest.register_assert_rewrite("helpers")
import helpers.typecheck  # noqa: E402, F401  # before regraft, whose signatures it checks
import jaxtyping  # noqa: E402
import torch  # noqa: E402
from helpers.faults import ForkServer  # noqa: E402
from helpers.tiny import save_model  # noqa: E402

from regraft.core.checkpoint import Checkpoint  # noqa: E402
from regraft.mixers.remix import Remix  # noqa: E402

torch.set_num_threads(1)
os.fsync = lambda file: None  # milliseconds, for files that need not outlive the machine


def pytest_collection_modifyitems(items):
    """Slow tests first: then no process has them left when the other is done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_runtest_setup(item):
    """Shapes in signatures are checked in the tests of the packages that have them: elsewhere the
    same functions run, and the checks cost an eighth of the time.
    """
    folders = {parent.name for parent in item.path.relative_to(item.config.rootpath).parents}
    jaxtyping.config.update("jaxtyping_disable", not folders & {"growth", "mixers"})


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An interpreter that has imported everything and forks itself for each command."""
    with ForkServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def forked_interpreter(server, monkeypatch):
    """`sys.executable` is one that has imported regraft: seconds less for each process. Not for
    tests of what is imported, or of a process whose parent dies.
    """
    monkeypatch.setattr(sys, "executable", server.python)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def linearized(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("linear") / "model"
    Remix(keep="0", window=16, sinks=2)(Checkpoint.open(source)).save(out)
    return out


@pytest.fixture
def small_disk(request, tmp_path):
    """A folder that is a disk of its own, of 400 kB or what an indirect parameter says."""
    place = tmp_path / "disk"
    place.mkdir()
    command = [
        "mount",
        "-t",
        "tmpfs",
        "-o",
        f"size={getattr(request, 'param', '400k')}",
        "tmpfs",
        str(place),
    ]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted")
    yield place
    subprocess.run(["umount", str(place)], check=True)
