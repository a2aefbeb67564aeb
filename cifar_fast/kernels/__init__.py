"""Convolutions and fused norms for a CPU, in C, and fused norms for a GPU, in Triton; all compiled on first use."""
