"""The parts of the language-model jobs: texts to tokens, packing, LoRA under DeepSpeed, adapters, evaluation."""
