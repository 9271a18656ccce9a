"""The GPT pretraining harness, imported as `celo2.pretrain`; `pretrain/train_gpt.py` is its program."""

from importlib.util import find_spec

_missing = [name for name in ("matplotlib", "tqdm") if find_spec(name) is None]
if _missing:
    raise ImportError(f"the harness needs {' and '.join(_missing)}: pip install 'celo2[train]'")
