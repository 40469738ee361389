"""A student in a Lightning Trainer, on an image folder and its classes.

python examples/without_labels/lightning_module.py --images images
"""

import argparse

import lightning as L
import timm
import torch
from timm.data import create_transform
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

parser = argparse.ArgumentParser()
parser.add_argument("--images", required=True, help="folder with train/ and val/")
parser.add_argument("--student", default="resnet18")
parser.add_argument("--size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=256, help="in each process")
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--lr", type=float, default=0.001)
parser.add_argument("--workers", type=int, default=4)
parser.add_argument("--out", default="lightning")
parser.add_argument("--resume", help="checkpoint to go on from")


class Student(L.LightningModule):
    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.args = args
        self.val_images = ImageFolder(f"{args.images}/val", create_transform(args.size))
        self.network = timm.create_model(args.student, num_classes=len(self.val_images.classes))

    def train_dataloader(self):
        args = self.args
        images = ImageFolder(f"{args.images}/train", create_transform(args.size, True))
        return DataLoader(
            images, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers
        )

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.network(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def val_dataloader(self):
        return DataLoader(self.val_images, self.args.batch_size, num_workers=self.args.workers)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        right = (self.network(x).argmax(1) == y).float().mean()
        self.log("top1", 100 * right, prog_bar=True, sync_dist=True, batch_size=len(y))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.args.lr)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.args.epochs)
        return [optimizer], [scheduler]


def main(args: argparse.Namespace) -> None:
    trainer = L.Trainer(max_epochs=args.epochs, default_root_dir=args.out)
    trainer.fit(Student(args), ckpt_path=args.resume)
    print(f"top-1 {trainer.callback_metrics['top1'].item():.2f} %")


if __name__ == "__main__":
    main(parser.parse_args())
