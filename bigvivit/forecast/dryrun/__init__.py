"""A program of anybody's, run on virtual GPUs for some optimizer steps: what each of its ranks took, and where.

`launch` starts it and reads what its ranks wrote, `recorder` works inside each of them, `history` makes sense of what
PyTorch's allocator recorded there, `search` finds the largest value that fits, `sandbox` keeps its writes away.
"""
