"""A Vision Transformer of timm, trained with FusedCelo2 on the Fashion-MNIST images (8 x 8) in the package.

    python timm_vit.py --steps 300

needs `pip install 'celo2[vision]'`. `--lr` is the rate of the last block's hidden matrices; those before it have less
(layer decay), and embeddings, head and vectors 20 times as much.

For the real size: `timm.create_model("vit_base_patch16_224")`, your loader, and a rate: begin at half of what AdamW
has in your recipe for the same batch, 5e-4 in place of 1e-3, and sweep a factor of 1.8 to either side
(docs/learning-rates.md). A weight decay is multiplied by the rate: at half of the rate take twice the decay. From
scratch, leave the layer decay out: FusedCelo2(model, lr=lr).
"""

import argparse

import timm
import torch
from timm.optim import param_groups_layer_decay
from torch.optim.lr_scheduler import OneCycleLR

from celo2 import FusedCelo2
from celo2.meta.images import EMBEDDED, load_npz

BATCH = 128


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small ViT of timm with FusedCelo2.")
    parser.add_argument("--steps", type=int, default=300, help="default: 300")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate (default: 1e-3)")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: must be at least 1")
    lr = arguments.lr
    torch.manual_seed(0)
    data = load_npz(EMBEDDED)["fashion_mnist"]
    images_N1HW = torch.as_tensor(data.images, dtype=torch.float32).view(-1, 1, 8, 8)
    labels_N = torch.as_tensor(data.labels)
    shape = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 4}
    model = timm.create_model("vit_tiny_patch16_224", **shape)

    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.75)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer = FusedCelo2(groups, lr=lr, module=model)
    # a peak for each group, and no cycle of momenta, which are part of what was learned
    peaks = [group["lr"] for group in optimizer.param_groups]
    scheduler = OneCycleLR(optimizer, peaks, total_steps=arguments.steps, pct_start=0.1, cycle_momentum=False)
    held_out = 1024
    for step in range(arguments.steps):
        rows = torch.randint(held_out, len(labels_N), (BATCH,))
        loss = torch.nn.functional.cross_entropy(model(images_N1HW[rows]), labels_N[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 10 == 0:
            print(f"step {step} | loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        logits = model(images_N1HW[:held_out])
    loss = torch.nn.functional.cross_entropy(logits, labels_N[:held_out])
    accuracy = (logits.argmax(1) == labels_N[:held_out]).float().mean()
    print(f"validation loss {loss:.4f} | accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
