"""From a PyTorch model to an ONNX file, an engine and a runner; kernels for CPU and GPU."""
