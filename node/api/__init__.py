"""The loopback API of a node: what the `kaisar` commands and the pages talk to (`docs/api.md`)."""
