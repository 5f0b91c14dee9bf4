"""Triton kernels for CUDA: LoRA per row, decode attention, sampling. Nothing here is imported where triton is missing.

All of them can be captured in a CUDA graph: grids depend on shapes only, what changes from step to step lies in
tensors. A row's result doesn't depend on its neighbours. Tensors are contiguous unless a docstring says otherwise.
"""
