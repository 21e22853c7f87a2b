"""The CausalConvWithState operator of ai.onnx 27 and com.microsoft 1."""
