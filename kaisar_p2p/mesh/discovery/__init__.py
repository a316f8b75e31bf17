"""Finding peers: addresses, signed records, exchange and rendezvous, the local network, redialing."""
