"""Gloo uses the interface of this node's Ray address, unless one is set already or no interface has that address."""

import os
import socket
from types import SimpleNamespace

import psutil
import pytest
import ray

from rm_robust.cluster.environment import INTERFACE_VARIABLE, listen_where_ray_does

ADDRESSES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "enp3s0": ["10.0.0.7", "fe80::1%enp3s0"],
    "enp4s0": ["10.0.0.77"],
}


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces = {
        name: [SimpleNamespace(family=socket.AF_INET, address=address) for address in addresses]
        for name, addresses in ADDRESSES.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setenv(INTERFACE_VARIABLE, "before")  # so that the end of the test removes what it sets
    monkeypatch.delenv(INTERFACE_VARIABLE)


@pytest.mark.parametrize(("address", "name"), [("10.0.0.7", "enp3s0"), ("10.0.0.77", "enp4s0"), ("127.0.0.1", "lo")])
def test_gloo_uses_the_interface_that_has_rays_address(
    monkeypatch: pytest.MonkeyPatch, address: str, name: str
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: address)
    listen_where_ray_does()
    assert os.environ[INTERFACE_VARIABLE] == name


def test_an_interface_that_is_already_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.setenv(INTERFACE_VARIABLE, "docker0")
    listen_where_ray_does()
    assert os.environ[INTERFACE_VARIABLE] == "docker0"


def test_an_address_that_no_interface_has_is_logged_and_nothing_is_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "203.0.113.9")
    listen_where_ray_does()
    assert INTERFACE_VARIABLE not in os.environ
    assert "No network interface has this node's Ray address 203.0.113.9" in caplog.text
