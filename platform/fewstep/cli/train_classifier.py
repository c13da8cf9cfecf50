"""`fewstep train-classifier`: the judge of class-conditional students."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Train a small convolutional classifier on the training split of a labelled dataset, and print its accuracy on the
held-out split. Samples of students are judged with it: the Fréchet distance of its features, and how often it sees the
class that was asked for. Minutes on a CPU."""
EXAMPLES = """\
examples
  {program}
  {program} --data data/fashion28 --epochs 12 --out out/classifier.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--data", default="data/fashion28", help="prepared dataset; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("out/classifier.safetensors"), help="default: %(default)s"
    )


def run(options: argparse.Namespace) -> None:
    """Train, print the accuracy and write the weights.

    Raises:
        UserError: the dataset has no classes or no pictures.
    """
    from tqdm.auto import tqdm

    from fewstep.cluster import connect_ray
    from fewstep.data.datasets.bundled import open_data
    from fewstep.data.stream import read_split
    from fewstep.encoders import load_autoencoder
    from fewstep.encoders.labels import LabelEncoder, is_labels
    from fewstep.errors import UserError
    from fewstep.evaluate.classifier import brightness_of, train_classifier
    from fewstep.files import save_weights
    from fewstep.models.conditioning import ClassConditioning

    connect_ray()
    info = open_data(options.data)
    if not is_labels(info.encoding.text_encoder) or not info.has_latents:
        raise UserError(
            f"--data: {options.data} is not a set of pictures with classes: prepare one with a label encoder, such as "
            "fewstep prepare-data --source fashion-mnist --out data/fashion28."
        )
    decode = load_autoencoder(info.encoding.autoencoder).decode
    encoder = LabelEncoder(info.encoding.text_encoder)
    train, held_out = (read_split(options.data, split) for split in ("train", "held_out"))
    assert train.latent is not None
    assert held_out.latent is not None
    assert isinstance(train.conditioning, ClassConditioning)
    assert isinstance(held_out.conditioning, ClassConditioning)
    epochs = train_classifier(
        brightness_of(decode(train.latent)),
        train.conditioning.labels,
        len(encoder.classes),
        epochs=options.epochs,
        seed=options.seed,
    )
    with tqdm(total=options.epochs, unit=" epochs") as bar:
        for classifier, loss in epochs:  # noqa: B007 — the last one is kept
            bar.set_postfix(loss=f"{loss:.3f}")
            bar.update()
    seen = classifier.eval().classify(decode(held_out.latent).numpy())
    accuracy = float((seen == held_out.conditioning.labels.numpy()).mean())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    # Half the size on disk; what it sees does not depend on the digits that are lost.
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in classifier.state_dict().items()
    }
    save_weights(
        halves, options.out, metadata={"classes": info.encoding.text_encoder, "accuracy": f"{accuracy:.4f}"}
    )
    print(
        f"accuracy    {accuracy:.4f} on {len(held_out)} held-out pictures\nclassifier  {options.out.absolute()}"
    )
