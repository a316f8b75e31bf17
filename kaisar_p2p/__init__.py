"""What touches the world: wire formats, keys, mesh, ledger, runtimes and hardware. Knows bytes, never verdicts or orders."""
