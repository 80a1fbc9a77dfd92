"""The end of MASt3R's descriptor head: features of tokens to unit descriptors and confidences of pixels."""
