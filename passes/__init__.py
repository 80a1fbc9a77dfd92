"""Passes: ONNX graph -> ONNX graph, without torch, GPU or files.

`prepare` turns a model into the graph that passes work on; each pass, called with it, changes it in place and reports what it did.
Which of them run for which backend, and in which order, is in `smc.compiler.pipeline`.
"""
