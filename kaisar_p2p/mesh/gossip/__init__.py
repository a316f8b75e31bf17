"""Publish and subscribe: the wire, the router, queues by priority, what was seen, pubsub itself."""
