"""Convolutions and norms for a CPU, written in C and compiled on first use."""
