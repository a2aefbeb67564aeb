"""Convolutions and fused norms for a CPU, written in C and compiled on first use."""
