"""The objective in Triton's kernels, for GPUs: begin with `choice`, which says where they take the place of torch.

Triton comes with torch for GPUs and is no dependency: `chunked` imports `choice` only where it is there.
"""
