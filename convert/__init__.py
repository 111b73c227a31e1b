"""Checkpoints and GGUF files in; a skeleton and an expert store out."""
