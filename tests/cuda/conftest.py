"""The backend over the emulated extension, for every test here."""

import pytest
from emulation_build import emulated_backend, load_emulated

from flowkern import cuda


@pytest.fixture(scope="session")
def emulated():
    """The extension's submodule for GPUs, running on the CPU."""
    return load_emulated()


@pytest.fixture
def backend(emulated):
    """flowkern.cuda over the emulation."""
    with emulated_backend(emulated):
        yield cuda


@pytest.fixture(params=["forward", "reverse"])
def order(request, monkeypatch):
    """The order in which the emulation runs a block's threads."""
    monkeypatch.setenv("FLOWKERN_EMULATE", request.param)
    return request.param
