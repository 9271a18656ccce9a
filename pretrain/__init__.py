"""The GPT pretraining harness, imported as `celo2.pretrain`; `pretrain/train_gpt.py` is its program.

Models, recipes, optimizers and shards need PyTorch and NumPy alone; what a program needs beyond, it asks for.
"""

from importlib.util import find_spec


def require(*packages: str, extra: str = "train") -> None:
    """Raise ImportError that says what to install, unless these packages are here."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"this needs {' and '.join(missing)}: pip install 'celo2[{extra}]'")
