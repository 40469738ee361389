"""A student trained as timm's train script does it, on recorded crops and their stored labels.

python examples/timm_script.py --images images --store store
"""

import argparse

import torch
from timm import create_model
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy

from fkdpipe import LabelledCrops

parser = argparse.ArgumentParser()
parser.add_argument("--images", required=True, help="folder with train/ and val/")
parser.add_argument("--store", required=True)
parser.add_argument("--model", default="resnet50")
parser.add_argument("--img-size", type=int, default=224)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--warmup-epochs", type=int, default=1)
parser.add_argument("--opt", default="lamb")
parser.add_argument("--lr", type=float, default=0.005)
parser.add_argument("--weight-decay", type=float, default=0.02)
parser.add_argument("--model-ema-decay", type=float, default=0.9998)
parser.add_argument("--workers", type=int, default=4)


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset_eval = create_dataset("", args.images, split="val")
    common = {
        "input_size": (3, args.img_size, args.img_size),
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "persistent_workers": args.workers > 0,
        "device": device,
    }
    loader_eval = create_loader(dataset_eval, **common)
    loader_train = LabelledCrops(
        args.store, args.images, target="marginal-smoothing:5", size=args.img_size,
        batch_size=args.batch_size, crops_per_image=4,
    )  # fmt: skip

    model = create_model(args.model, num_classes=len(dataset_eval.reader.class_to_idx))
    model.to(device, memory_format=torch.channels_last)
    model_ema = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True)
    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    scheduler, num_epochs = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=len(loader_train),
    )
    loss_fn = torch.nn.CrossEntropyLoss()

    num_updates = 0
    for epoch in range(num_epochs):
        model.train()
        for batch in loader_train:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = loss_fn(model(batch.pixels), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            num_updates += 1
            model_ema.update(model, step=num_updates)
            scheduler.step_update(num_updates)
        scheduler.step(epoch + 1)
        top1 = validate(model_ema.module, loader_eval, device)
        print(f"epoch {epoch}: top-1 {top1:.2f} %")


@torch.inference_mode()
def validate(model: torch.nn.Module, loader, device: torch.device) -> float:
    top1 = AverageMeter()
    model.eval()
    for inputs, target in loader:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            output = model(inputs)
        top1.update(accuracy(output, target)[0].item(), len(target))
    return top1.avg


if __name__ == "__main__":
    main(parser.parse_args())
