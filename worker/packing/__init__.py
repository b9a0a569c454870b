"""Quantised safetensors checkpoints: which packing a directory uses, and its weights as QuantizedMatrix."""
