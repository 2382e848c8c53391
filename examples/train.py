"""Train one of the networks of the examples: `python examples/train.py fashion_vit`.

The settings of each network in `RECIPES` are those that made the committed checkpoint. Writes
`examples/checkpoints/NAME.pt` (half precision, so that the files stay small; they are used as float32).
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor
from torch.nn import functional
from workloads import CHECKPOINTS, NETWORKS, accuracy, logits

RECIPES = {
    "digits_vit": {"epochs": 400, "batch": 128, "lr": 2e-3},
    "fashion_vit": {"epochs": 32, "batch": 256, "lr": 3e-3},
    "fashion_cnn": {"epochs": 6, "batch": 256, "lr": 4e-3},
}


def shifted(images: Tensor, pixels: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to `pixels` in both directions, and flipped with probability 1/2."""
    n, _, height, width = images.shape
    padded = functional.pad(images, [pixels] * 4, value=float(images.min()))
    dy, dx = (torch.randint(0, 2 * pixels + 1, (n, 1), generator=generator) for _ in range(2))
    rows = (torch.arange(height) + dy)[:, None, :, None].expand(n, images.shape[1], height, padded.shape[3])
    columns = (torch.arange(width) + dx)[:, None, None, :].expand(n, images.shape[1], height, width)
    out = padded.gather(2, rows).gather(3, columns)
    if flip:
        mirror = torch.rand(n, generator=generator) < 0.5
        out[mirror] = out[mirror].flip(3)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    recipe = {name: getattr(args, name) or value for name, value in RECIPES[args.network].items()}
    args = argparse.Namespace(**vars(args) | recipe)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    make, load = NETWORKS[args.network]
    data, model = load(), make()
    flip = args.network.startswith("fashion")
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.03)
    steps = args.epochs * (len(data.train) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.15)
    started = time.monotonic()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(data.train), generator=generator)
        for index in order[: len(order) // args.batch * args.batch].split(args.batch):
            images = shifted(data.train[index], 1, flip, generator)
            loss = functional.cross_entropy(model(images), data.train_labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
    model.eval()
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    CHECKPOINTS.mkdir(exist_ok=True)
    torch.save(state, CHECKPOINTS / f"{args.network}.pt")
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    print(f"test accuracy {accuracy(logits(model, data.test), data.test_labels):.4f}", flush=True)


if __name__ == "__main__":
    main()
