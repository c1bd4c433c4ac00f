"""Base models, LoRA adapters and prompt templates."""
