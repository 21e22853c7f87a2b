"""Passes over the ONNX graph, a file a pass: each takes the model and gives it back checked, bound or simpler."""
