"""The GPT pretraining harness, imported as `celo2.pretrain`; `pretrain/train_gpt.py` is its program."""
