"""The GPU kernels in Triton, installed as ``metagpt_fast.kernels``; ``metagpt_fast.backends.triton`` launches them.

Importing this package imports nothing. Each kernel has its stem in a file of the same name; ``launch`` is pure Python,
and everything else needs Triton. The contract is docs/numerics.md, what is checked without a GPU docs/gpu.md.
"""

# Other packages look for a top-level `kernels` by its version, and find this one from the repository's root.
__version__ = "0"
