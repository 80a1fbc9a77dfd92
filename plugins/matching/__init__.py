"""FastNN-Lite on the GPU: reciprocal matches of two descriptor maps, from the maps to the sorted list with no round trip to the host.

`specification` says what is computed and on which operands, `kernel` holds the kernels and `launches` cuts the work. The plain
version, which these follow to the letter, is `smc.exported.matching`.
"""
