"""A simulated GPU: torch's own CUDA code runs to its end on a machine that has none.

`fakecuda.c` and `fakenccl.c` stand in for the CUDA runtime, its driver and NCCL. `numeric.py` computes on the CPU, in
the very memory that the CUDA tensors have, so that weights can be compared. `launches.py` computes nothing and counts
kernels, at full size; `work.py` adds what each of them reads, writes and computes. What none of this can show: the time
that anything takes, the rounding of real kernels, which algorithm cuDNN chooses, and races between streams.
"""
