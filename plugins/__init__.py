"""Custom operations, one folder each: specification, plain reference, kernel, and what registers it with TensorRT."""
