"""Run an example as its own process, after what `common` declares for torchvision.

python run_example.py [--shard-on-cpus] EXAMPLE [ARGUMENT ...]
"""

from __future__ import annotations

import runpy
import sys

from common import let_accelerate_shard_on_cpus

if __name__ == "__main__":
    del sys.argv[0]
    if sys.argv[0] == "--shard-on-cpus":
        del sys.argv[0]
        let_accelerate_shard_on_cpus()
    runpy.run_path(sys.argv[0], run_name="__main__")
