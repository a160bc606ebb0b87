"""Artifacts by fingerprint, claims and heartbeats: the state on disk between and during stages."""
