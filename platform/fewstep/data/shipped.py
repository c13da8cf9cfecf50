"""The two datasets that come along: what the recipes name is prepared when it is first asked for."""

from __future__ import annotations

from fewstep.data.schema import MANIFEST, DatasetInfo
from fewstep.data.storage import Storage

EMOJI_DATA = "data/emoji16"
"""Where the bundled emoji set is prepared."""

FASHION_DATA = "data/fashion28"
"""Where Fashion-MNIST is prepared."""


def open_data(path: str) -> DatasetInfo:
    """A recipe's dataset; at the shipped recipes' own paths it is prepared first, once.

    At any other path nothing is: a mistyped one must be refused, not trained on something else.

    Raises:
        UserError: see `DatasetInfo.open`.
    """
    from fewstep.data.encode import EMOJI, FASHION, prepare
    from fewstep.data.fashion import fashion_mnist
    from fewstep.data.sources import emoji_set

    shipped = {
        EMOJI_DATA: ("the bundled emoji set", emoji_set, EMOJI),
        FASHION_DATA: ("Fashion-MNIST", fashion_mnist, FASHION),
    }
    if path in shipped and Storage.at(path).read(MANIFEST) is None:
        what, source, settings = shipped[path]
        print(f"preparing {what} in {path} (once)", flush=True)
        prepare(source(), path, settings, encoders=2, report=lambda line: print(line, flush=True))
    return DatasetInfo.open(path)
