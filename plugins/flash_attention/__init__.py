"""Attention without its score matrix.

`specification` says what it computes, `reference` does so plainly and `onnx_function` in standard ONNX operations; `kernel` is the
fast one, `aot` compiles it for a GPU, and `tensorrt_plugin` brings it into TensorRT.
"""
