"""Artifacts by fingerprint, claims, heartbeats: what is on disk between and during stages."""
