"""Feature caching: when to reuse what the network computed before, and what to hand back in its place."""
