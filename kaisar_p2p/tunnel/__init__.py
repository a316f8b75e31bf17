"""A local TCP connection carried over a mesh stream. Who may open one is decided above."""

from __future__ import annotations

from kaisar_p2p.tunnel.splice import TunnelCounters, TunnelStream, serve_local, splice

__all__ = ["TunnelCounters", "TunnelStream", "serve_local", "splice"]
