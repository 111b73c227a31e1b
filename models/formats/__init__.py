"""Files as they are: GGUF, safetensors, npz. Opened, listed, distrusted; written whole or not at all."""
