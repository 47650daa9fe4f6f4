"""``layer.unroll``: the request that goes with the call, its result, and the figures of it."""
