"""Triton kernels of a decoded token, for CUDA; tests run them in Triton's interpreter."""
