"""Meta-training of theta, imported as `celo2.meta`: tasks, truncated unrolls, PES, the outer loop, and its judges."""
