"""The conversion pipeline: checkpoints in, validated long-context artifacts out.

Imports runtime and kernels, never the other way.
"""
