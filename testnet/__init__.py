"""Many nodes: a manifest describes a network, which runs as local processes; the demo observes one end to end."""
