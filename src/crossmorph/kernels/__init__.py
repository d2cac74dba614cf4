"""Compiled CPU twins of the torch functions of the same name.

Every kernel works on a range of planes of its output, releases the GIL, and is run in fixed chunks on a thread
pool (``parallel.py``), so results do not depend on the number of threads. The torch functions remain the
reference: tests compare the two, and CUDA tensors take them.
"""
