"""Attention without its score matrix.

`specification` says what it computes, `reference` does so plainly and `onnx_function` in standard ONNX operations; `kernel` is the
fast one, `hopper` a faster one for sm 9.0. `launches` makes them part of launch programs; `aot` compiles `kernel` for a GPU, and
`tensorrt_plugin` brings it into TensorRT.
"""
