"""The roles by name."""

from __future__ import annotations

from node.roles import Role
from node.roles.checker import CHECKER
from node.roles.everybody import EVERYBODY
from node.roles.provider import PROVIDER

PASSIVE = Role(lambda _: [])
"""Every node has the machine of a client, because any node may place orders; and every node indexes."""

ROLES = {
    "provider": PROVIDER,
    "checker": CHECKER,
    "client": PASSIVE,
    "explorer": PASSIVE,
    "bootstrap": PASSIVE,
    "everybody": EVERYBODY,
}
