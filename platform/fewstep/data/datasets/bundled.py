"""The datasets of the shipped recipes, which are prepared when they are first opened."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.data.datasets import EMOJI_DATA, FASHION_DATA, streamed
from fewstep.data.schema import MANIFEST, DatasetInfo
from fewstep.storage import Storage


def open_data(path: str) -> DatasetInfo:
    """Open a recipe's dataset; at the paths of the shipped recipes it is prepared first, once.

    At other paths nothing is prepared: a mistyped path must be refused, and not be filled with some other data.

    Raises:
        UserError: see `DatasetInfo.open`.
    """
    # Imported here, because what only opens a dataset does without the code that prepares one.
    from fewstep.data.datasets import emoji, fashion_mnist
    from fewstep.data.prepare import PreparationConfig, prepare
    from fewstep.data.sources import Source

    shipped: dict[str, tuple[str, Callable[[], Source], PreparationConfig]] = {
        EMOJI_DATA: ("the bundled emoji set", emoji.emoji_set, emoji.PREPARATION),
        FASHION_DATA: ("Fashion-MNIST", fashion_mnist.fashion_mnist, fashion_mnist.PREPARATION),
    }
    raw = {streamed(folder): folder for folder in shipped}
    if (folder := raw.get(path, path)) in shipped and Storage.at(path).read(MANIFEST) is None:
        what, source, config = shipped[folder]
        print(f"preparing {what} in {path} (once)", flush=True)
        prepare(
            source(), path, config, encode=path not in raw, encoders=2,
            report=lambda line: print(line, flush=True),
        )  # fmt: skip
    return DatasetInfo.open(path)
