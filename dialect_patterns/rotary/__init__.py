"""Rotary embeddings: RotaryEmbedding and MRotaryEmbedding."""
