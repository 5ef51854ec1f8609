"""Serve models with NVIDIA Triton Inference Server: the model repository, and a server here.

`repository` writes what any Triton serves, `server` runs one on this machine.
"""
