"""Attention (ai.onnx) and GroupQueryAttention (com.microsoft): contracts and strategies."""
