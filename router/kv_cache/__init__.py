"""The paged KV cache: which block holds what (`blocks`, arithmetic alone), and the tensors behind it."""
