"""The calibration pass: sums over windows that select units."""
