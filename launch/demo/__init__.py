"""The demo's assets: real weights, real text and an offline benchmark, made from what is installed."""
