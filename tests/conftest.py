import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # must precede the first import of a kernel module


@pytest.fixture(scope="session", autouse=True)
def context_of_autograds_thread() -> None:
    """torch warns, once a process, where a product is the first thing that this thread runs."""
    if torch.cuda.is_available():
        torch.ones(1, device="cuda", requires_grad=True).exp().backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
