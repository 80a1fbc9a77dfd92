"""Custom operations, one folder each. None exist yet: the plans of this version use standard ONNX operations alone."""
