"""Many of them: a manifest describes a network, which runs as local processes; the demo observes one from end to end."""
