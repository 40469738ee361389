"""A student trained with Accelerate, on recorded crops and their stored labels.

accelerate launch examples/accelerate_script.py --images images --store store
"""

import argparse
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
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
parser.add_argument("--batch-size", type=int, default=256, help="in each process")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--lr", type=float, default=0.001)
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--out", type=Path, default="accelerate", help="goes on from it")


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    train = LabelledCrops(  # takes its rank from torchrun: not prepared
        args.store, args.images, target="marginal-smoothing:5", size=args.size,
        batch_size=args.batch_size * accelerator.num_processes, crops_per_image=4,
    )  # fmt: skip
    val_images = ImageFolder(f"{args.images}/val", create_transform(args.size))
    val = DataLoader(val_images, 128, num_workers=args.workers)

    student = timm.create_model(args.student, num_classes=len(val_images.classes))
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    student, optimizer, val = accelerator.prepare(student, optimizer, val)
    accelerator.register_for_checkpointing(scheduler, train)
    if args.out.exists():
        accelerator.load_state(args.out)

    for _ in range(scheduler.last_epoch, args.epochs):
        student.train()
        for batch in train:
            loss = cross_entropy(student(batch.pixels), batch.labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        scheduler.step()
        accelerator.save_state(args.out)
    accelerator.print(f"top-1 {accuracy(accelerator, student, val):.2f} %")


@torch.no_grad()
def accuracy(accelerator: Accelerator, student: torch.nn.Module, val: DataLoader) -> float:
    student.eval()
    right = [accelerator.gather_for_metrics(student(x).argmax(1) == y) for x, y in val]
    return 100 * torch.cat(right).float().mean().item()


if __name__ == "__main__":
    main(parser.parse_args())
