"""Everything about ONNX graphs and their sessions."""
