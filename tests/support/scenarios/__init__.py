"""What several processes do in a test, a function a scenario: `on_ranks(2, sharded.skipped_steps)` in a test.

A scenario takes the mesh of all ranks, runs on every one of them, and returns what the test looks at, on rank 0.
"""
