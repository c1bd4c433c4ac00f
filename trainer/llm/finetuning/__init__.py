"""LoRA under ZeRO."""
