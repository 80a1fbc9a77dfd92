"""Passes: ONNX graph -> ONNX graph, without torch, GPU or files.

`prepare` turns a model into the graph that passes work on; `run_passes` applies a list of them, one report each.
The FlashMatch passes are here; builds do not run them yet, since no backend of this version gains by them.
"""
