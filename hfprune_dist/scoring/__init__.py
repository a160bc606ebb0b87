"""The calibration pass: sums over windows of text, from which units are scored."""
