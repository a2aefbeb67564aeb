"""Convolutions and fused norms: for a CPU written in C, for a GPU in Triton, and compiled on first use."""
