#!/usr/bin/env python
"""Train the classifier that judges the samples of a class-conditional student."""

import argparse
from pathlib import Path

from fewstep.cli import connect_ray, run_job

EXAMPLES = """\
examples
  jobs/train_classifier.py
  jobs/train_classifier.py --data data/fashion28 --epochs 12 --out out/classifier.safetensors"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train a small convolutional classifier on the training split of a labelled dataset, and print its "
        "accuracy on the held-out split. Samples of students are judged with it: the Fréchet distance of its features, "
        "and how often it sees the class that was asked for. Minutes on a CPU.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default="data/fashion28", help="prepared dataset; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("out/classifier.safetensors"), help="default: %(default)s"
    )
    options = parser.parse_args()

    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    from fewstep.data.autoencoder import load_autoencoder
    from fewstep.data.labels import LabelEncoder, is_labels
    from fewstep.data.shipped import open_data
    from fewstep.data.stream import Batch, read_split
    from fewstep.errors import UserError
    from fewstep.evaluate.classifier import brightness_of, train_classifier

    connect_ray()
    info = open_data(options.data)
    if not is_labels(info.encoding.text_encoder) or not info.has_latents:
        raise UserError(
            f"--data: {options.data} is not a set of pictures with classes: prepare one with a label encoder, such as "
            "jobs/prepare_data.py --source fashion-mnist --out data/fashion28."
        )
    decode = load_autoencoder(info.encoding.autoencoder).decode
    encoder = LabelEncoder(info.encoding.text_encoder)

    def labels(batch: Batch):  # noqa: ANN202 — a tensor, and torch is not loaded for the help page
        return batch.conditioning.states[:, 0, 0].long()

    train, held_out = (read_split(options.data, split) for split in ("train", "held_out"))
    epochs = train_classifier(
        brightness_of(decode(train.latent)),
        labels(train),
        len(encoder.classes),
        epochs=options.epochs,
        seed=options.seed,
    )
    with tqdm(total=options.epochs, unit=" epochs") as bar:
        for classifier, loss in epochs:  # noqa: B007 — the last one is kept
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
    seen = classifier.eval().classify(decode(held_out.latent).numpy())
    accuracy = float((seen == labels(held_out).numpy()).mean())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    save_file(
        halves, options.out, metadata={"classes": info.encoding.text_encoder, "accuracy": f"{accuracy:.4f}"}
    )
    print(
        f"accuracy    {accuracy:.4f} on {len(held_out)} held-out pictures\nclassifier  {options.out.absolute()}"
    )


if __name__ == "__main__":
    run_job(main)
