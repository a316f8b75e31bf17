"""libp2p implementations under control: js-libp2p, go-libp2p, the unmodified Python library, and this project's mesh.

All of them answer the same operations (`interface.Peer`), so that a test or a measurement is written once.
"""
