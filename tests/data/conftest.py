"""No test of the data layer reaches the network, unless it is marked and asked for."""

from __future__ import annotations

import os
import socket

import pytest


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("network"):
        if not os.environ.get("KDREFS_TEST_NETWORK"):
            pytest.skip("downloads a data set; set KDREFS_TEST_NETWORK=1 to run it")
        return
    connect = socket.socket.connect

    def only_this_machine(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1"):
            raise AssertionError(f"a test connects to {address}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", only_this_machine)
