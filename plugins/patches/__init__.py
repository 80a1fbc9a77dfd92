"""Images to the rows of a patch embedding: the convolution whose stride is its size becomes one matrix product."""
