"""Optimizers: RefLoRAAdamW, and RefLoRA around any other torch optimizer."""
