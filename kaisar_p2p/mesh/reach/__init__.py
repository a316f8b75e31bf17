"""Reaching everybody: dial-backs, port mappings, relays, hole punching."""
