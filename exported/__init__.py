"""The runtime: everything that ships to a deployment. Start reading at matcher.py. Never imports torch, onnx or the compiler."""
