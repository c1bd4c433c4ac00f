"""Language-model jobs: instruction samples, LoRA fine-tuning, text embeddings."""
