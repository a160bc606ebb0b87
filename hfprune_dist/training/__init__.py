"""Training: LoRA, or weights themselves, on labels or towards the dense model (README.md)."""
