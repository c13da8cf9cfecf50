"""The datasets of the shipped recipes, which are prepared when they are first opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fewstep.data.datasets import EMOJI64_DATA, EMOJI_DATA, EMOJI_EDITS_DATA, FASHION_DATA, streamed
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
    from fewstep.images import Size

    shipped: dict[str, tuple[str, Callable[[Sequence[Size]], Source], PreparationConfig]] = {
        EMOJI_DATA: ("the bundled emoji set", emoji.emoji_set, emoji.PREPARATION),
        EMOJI64_DATA: ("the bundled emoji set of 64 pixels", emoji.emoji_set, emoji.PREPARATION_64),
        EMOJI_EDITS_DATA: ("the bundled edits of emoji", emoji.emoji_edits, emoji.PREPARATION),
        FASHION_DATA: ("Fashion-MNIST", lambda _: fashion_mnist.fashion_mnist(), fashion_mnist.PREPARATION),
    }
    raw = {streamed(folder): folder for folder in shipped}
    if (folder := raw.get(path, path)) in shipped and Storage.at(path).read(MANIFEST) is None:
        what, source, config = shipped[folder]
        print(f"preparing {what} in {path} (once)", flush=True)
        prepare(
            source(config.sizes), path, config, encode=path not in raw, encoders=2,
            report=lambda line: print(line, flush=True),
        )  # fmt: skip
    return DatasetInfo.open(path)
