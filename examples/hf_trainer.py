"""A student in the Hugging Face Trainer, on recorded crops and their stored labels.

python examples/hf_trainer.py --images images --store store
"""

import argparse

import timm
import torch
from accelerate.data_loader import DataLoaderShard
from timm.data import create_transform
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder
from transformers import Trainer, TrainingArguments

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
parser.add_argument("--out", default="hf")
parser.add_argument("--resume", help="checkpoint to go on from")


class Student(torch.nn.Module):
    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        self.network = timm.create_model(name, num_classes=classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict:
        logits = self.network(pixel_values)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


class CropsTrainer(Trainer):
    def get_train_dataloader(self):
        return DataLoaderShard(self.train_dataset, batch_size=None,
            collate_fn=lambda b: {"pixel_values": b.pixels, "labels": b.labels})  # fmt: skip


def collate(samples: list) -> dict:
    images, classes = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(classes)}


def main(args: argparse.Namespace) -> None:
    val = ImageFolder(f"{args.images}/val", create_transform(args.size))
    settings = TrainingArguments(
        output_dir=args.out,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        dataloader_num_workers=args.workers,
        dataloader_drop_last=True,
        save_strategy="epoch",
        eval_strategy="epoch",
        report_to="none",
    )
    train = LabelledCrops(args.store, args.images, target="marginal-smoothing:5", size=args.size,
        batch_size=args.batch_size * settings.world_size, crops_per_image=4)  # fmt: skip
    trainer = CropsTrainer(
        Student(args.student, len(val.classes)),
        settings,
        train_dataset=train,
        eval_dataset=val,
        data_collator=collate,
        compute_metrics=lambda p: {"top1": 100 * (p.predictions.argmax(1) == p.label_ids).mean()},
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print(f"top-1 {trainer.evaluate()['eval_top1']:.2f} %")


if __name__ == "__main__":
    main(parser.parse_args())
