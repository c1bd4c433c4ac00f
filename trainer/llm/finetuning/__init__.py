"""LoRA fine-tuning of a language model under DeepSpeed's ZeRO."""
