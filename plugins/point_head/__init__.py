"""The last layers of the DPT head as one kernel: a convolution, a product with four columns, and points and confidence from these.

`specification` says what it computes, `reference` does so plainly, `kernel` has the kernel and `launches` what to launch.
"""
