"""Where tenants' programs run: Docker, or plain processes for development."""

from __future__ import annotations

from kaisar_p2p.runtime.interface import ContainerRuntime, ContainerSpec, ContainerStatus, ExecSession
from kaisar_p2p.runtime.select import select_runtime

__all__ = ["ContainerRuntime", "ContainerSpec", "ContainerStatus", "ExecSession", "select_runtime"]
