"""The ledger's rules: finalized blocks in, state out. The same on every node."""
