"""Layer normalization of rows, of several groups in one launch, each with weights of its own."""
