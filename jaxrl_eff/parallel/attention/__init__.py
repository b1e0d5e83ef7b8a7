"""Attention over sequences sharded across devices, and its kernels."""
