"""The demo's assets: real weights, real text and an offline benchmark, made from installed packages."""
