"""Attention over tokens that are sharded over devices, and its kernels."""
