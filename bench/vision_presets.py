"""The numbers of `vision.py`: of a run on real and on the embedded images, and of the optimizers, with their sources.

A source that says "untested" is a starting point, not a result.
"""

from dataclasses import replace

from vision_models import NANO

from celo2.pretrain.recipes import Tuning

# Beyer, Zhai, Kolesnikov 2022 (arXiv 2205.01580), at batch 1024: RandAugment of 2 operations at level 10, mixup 0.2
REAL = {
    "model": "vit_small_patch16_224",
    "steps": 50_000,
    "batch": 512,
    "save_every": 1000,
    "eval_every": 2500,
    "log_every": 50,
    "mixup": 0.2,
    "aa": "rand-m10-n2",
    "color_jitter": 0.4,
    "reprob": 0.0,
    "crop_pct": 0.9,
}
EMBEDDED = {
    "model": NANO,
    "steps": 400,
    "batch": 128,
    "save_every": 200,
    "eval_every": 100,
    "log_every": 25,
    "mixup": 0.0,
}
_VIT = Tuning(lr=1e-3, weight_decay=0.1, max_grad_norm=1.0, betas=(0.9, 0.999))
_CELO2 = Tuning(lr=2.15e-4)
_VELO = Tuning(lr=1.0, warmup_frac=0.0, final_lr_frac=1.0)
_PAPER = "schedule, no clip: Celo2 paper; lr: the fifth of its seven sweep values, untested"
# of an optimizer, on real images and on the embedded ones: its numbers and their source
TUNINGS: dict[tuple[str, str], tuple[Tuning, str]] = {
    ("real", "adamw"): (_VIT, "lr, decay, clip: Beyer et al. 2022, arXiv 2205.01580; schedule: Celo2 paper; untested"),
    ("real", "muon"): (
        Tuning(lr=2e-2, adam_lr=1e-3, betas=(0.9, 0.999)),
        "ours, untested; AdamW side: Beyer et al. 2022",
    ),
    **{("real", opt): (_CELO2, _PAPER) for opt in ("celo2", "celo2-base")},
    ("real", "velo"): (_VELO, "no schedule: VeLO has its own; untested"),
    ("embedded", "adamw"): (replace(_VIT, lr=3e-3, betas=(0.9, 0.95)), "ours, for one core"),
    ("embedded", "muon"): (Tuning(lr=2e-2, adam_lr=3e-3), "ours, for one core"),
    **{
        ("embedded", opt): (Tuning(lr=1e-3), "ours, for one core; lr: the top of the Celo2 paper's sweep")
        for opt in ("celo2", "celo2-base")
    },
    ("embedded", "velo"): (_VELO, "no schedule: VeLO has its own; untested"),
}
UNTESTED = (Tuning(lr=1e-3), "ours, untested")
