"""torchrun's own store, in which its agents meet: it asks nobody for a secret and its readers unpickle what they find.

So it is open only while ranks run, on a port of its own, on the address by which the nodes reach node 0; a firewall must do the rest.
"""

from __future__ import annotations

import socket

from igpo_megatron.launch.node import Node


def open_store(node: Node) -> object:
    """The store on node 0, open until nothing refers to it. Raises OSError where the port is taken."""
    import torch.distributed as dist

    # Our own socket: left to itself torch listens on every interface.
    listener = socket.create_server((node.address, node.rendezvous_port), backlog=1024)
    place = node.address, node.rendezvous_port
    return dist.TCPStore(*place, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
