"""Which network interface gloo listens on, in every process that is to join a group."""

import logging
import os

import psutil

logger = logging.getLogger(__name__)

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"


def listen_where_ray_does() -> None:
    """Gloo groups that this process opens from now on use the interface of its node's Ray address; a GLOO_SOCKET_IFNAME that is set stays.

    Left alone gloo takes the address of the machine's own name. Debian and Ubuntu write that into /etc/hosts as 127.0.1.1, which no other machine reaches.
    """
    if INTERFACE_VARIABLE in os.environ:
        return
    import ray

    address = ray.util.get_node_ip_address()
    found = [name for name, own in psutil.net_if_addrs().items() if address in [each.address for each in own]]
    if found:
        os.environ[INTERFACE_VARIABLE] = found[0]
    else:
        logger.warning(
            "No network interface has this node's Ray address %s: gloo uses that of the machine's name. Where processes of several machines do not find "
            "each other, set %s on every node.",
            address,
            INTERFACE_VARIABLE,
        )
