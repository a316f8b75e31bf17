"""From TCP to streams: private swarms, Noise, yamux, agreeing on protocols, noticing the dead."""
