"""A student in a plain PyTorch loop, on recorded crops and their stored labels.

python examples/plain_loop.py --images images --store store
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_transform
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from fkdpipe import LabelledCrops

parser = argparse.ArgumentParser()
parser.add_argument("--images", required=True, help="folder with train/ and val/")
parser.add_argument("--store", required=True)
parser.add_argument("--student", default="resnet18")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--lr", type=float, default=0.001)
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--checkpoint", type=Path, default="last.pt", help="goes on from it")


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train = LabelledCrops(
        args.store, args.images, target="marginal-smoothing:5", size=args.size,
        batch_size=args.batch_size, crops_per_image=4,
    )  # fmt: skip
    val_images = ImageFolder(f"{args.images}/val", create_transform(args.size))
    val = DataLoader(val_images, args.batch_size, num_workers=args.workers)

    student = timm.create_model(args.student, num_classes=len(val_images.classes)).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)

    parts = {"student": student, "optimizer": optimizer, "scheduler": scheduler, "train": train}
    if args.checkpoint.exists():
        saved = torch.load(args.checkpoint)
        for name, part in parts.items():
            part.load_state_dict(saved[name])

    for _ in range(scheduler.last_epoch, args.epochs):
        student.train()
        for batch in train:
            loss = cross_entropy(student(batch.pixels), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, args.checkpoint)
    print(f"top-1 {accuracy(student, val, device):.2f} %")


@torch.no_grad()
def accuracy(student: torch.nn.Module, val: DataLoader, device: str) -> float:
    student.eval()
    right = [student(x.to(device)).argmax(1).cpu() == y for x, y in val]
    return 100 * torch.cat(right).float().mean().item()


if __name__ == "__main__":
    main(parser.parse_args())
