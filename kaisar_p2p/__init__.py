"""What touches the world: wire formats, keys, mesh, ledger, runtimes and hardware.

It knows bytes, never verdicts or orders.
"""
