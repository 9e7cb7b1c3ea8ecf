"""Kernels in C for matrices that stay quantized in memory."""
