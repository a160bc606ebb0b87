"""LoRA training: recovery and distillation."""
