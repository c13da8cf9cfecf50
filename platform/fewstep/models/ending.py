"""The last layers of a transformer, whose place a student's policy head takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fewstep.models.projection import LastProjection


@dataclass(frozen=True)
class Ending:
    """A transformer's last norm and output projection, in the form in which heads copy them.

    Attributes:
        norm: adaptive: called with hidden states (B, L, D) and the time embedding.
        projection: D → C·p².
        sign: −1 for a network whose output is −u.
        channel_last: whether the values of a token are ordered by row, column, channel; otherwise channel, row, column.
        time_width: width of the time embedding; None if it is D.
    """

    norm: nn.Module
    projection: nn.Linear | LastProjection
    sign: float = 1.0
    channel_last: bool = False
    time_width: int | None = None


class SwitchedNorm(nn.Module):
    """Takes the place of the base's last norm, or of its whole last layer: that layer, or the student's whole head.

    Args:
        teacher: the base's layer.
        head: the student's.
    """

    def __init__(self, teacher: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.teacher, self.head, self.student = teacher, head, True

    def forward(self, hidden: Tensor, *inputs: Tensor, **named: Tensor) -> Tensor:
        """(B, L, D) and the time embedding → the head's output, or the layer's."""
        # By position, as networks call their layers by names of their own.
        inputs = (*inputs, *named.values())
        return self.head(hidden, *inputs) if self.student else self.teacher(hidden, *inputs)


class SwitchedProjection(nn.Module):
    """Takes the place of the base's output projection: the projection, or nothing after the student's head.

    Args:
        teacher: the base's projection.
    """

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, True

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, ·) → the same in the student's role, and the projection's output otherwise."""
        return hidden if self.student else self.teacher(hidden)


Switch = SwitchedNorm | SwitchedProjection


def last_modules(transformer: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The base's own modules of these names, also where switches have taken their places."""
    modules = [transformer.get_submodule(name) for name in names]
    return [module.teacher if isinstance(module, Switch) else module for module in modules]


def put_switches(
    transformer: nn.Module, names: Sequence[str], head: nn.Module, *, keep: bool
) -> list[Switch]:
    """Put switches between the two roles in the places of a transformer's last modules.

    Args:
        transformer: changed in place.
        names: of its last modules, in order.
        head: the student's.
        keep: whether the modules stay, for the teacher's role.

    Returns:
        The switches. Setting `student` of all of them changes the role.
    """
    switches: list[Switch] = []
    for name, module in zip(names, last_modules(transformer, names), strict=True):
        own = module if keep else nn.Identity()
        switches.append(SwitchedProjection(own) if switches else SwitchedNorm(own, head))
        parent, _, last = name.rpartition(".")
        # Not setattr: names in a ModuleDict, such as "2-1", are no attributes.
        transformer.get_submodule(parent).register_module(last, switches[-1])
    return switches


class TokenCatch:
    """Keeps the output of a network's last module, which the network itself would rearrange to images.

    A forward hook; while it listens, the network goes on with zeros of the width that it expects, and its own result is
    not used. At all other calls, by whomever, the network is as it was.

    Args:
        width: values per token that the network's own projection gives.
    """

    def __init__(self, width: int) -> None:
        self._width, self._listens = width, False
        self._tokens: Tensor | None = None

    @classmethod
    def of(cls, transformer: nn.Module, name: str, width: int) -> TokenCatch:
        """The catch of the module of that name; the same one at each call, as compiled networks would be otherwise
        compiled anew."""
        module = transformer.get_submodule(name)
        if "token_catch" not in module.__dict__:
            catch = cls(width)
            module.__dict__["token_catch"] = catch
            module.register_forward_hook(catch)
        return module.__dict__["token_catch"]

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The hook."""
        if not self._listens:
            return output
        self._tokens = output
        return output.detach().new_zeros(()).expand(*output.shape[:-1], self._width)

    def during(self, call: Callable[[], Any]) -> Tensor:
        """The tokens (B, L, ·) of one call of the network; they are not kept."""
        self._listens = True
        try:
            call()
        finally:
            self._listens = False
            tokens, self._tokens = self._tokens, None
        assert tokens is not None, "the network has just been called"
        return tokens


class LateTime:
    """Gives the student's head in a last norm's place the time embedding, which the network itself adds only later.

    A hook on the module that embeds the time, and one on the norm's place.
    """

    def __init__(self) -> None:
        self._embedding: Tensor | None = None

    @classmethod
    def carry(cls, transformer: nn.Module, source: str, norm: str) -> None:
        """Have the student's head get the time embedding at every call from now on.

        Args:
            transformer: the network.
            source: name of the module whose first result is the time embedding.
            norm: name of the last norm.
        """
        embedding, place = transformer.get_submodule(source), transformer.get_submodule(norm)
        if "late_time" in place.__dict__:
            return
        if "late_time" not in embedding.__dict__:
            embedding.__dict__["late_time"] = carrier = cls()
            embedding.register_forward_hook(carrier.keep)
        place.__dict__["late_time"] = carrier = embedding.__dict__["late_time"]
        place.register_forward_pre_hook(carrier.give)

    def keep(self, module: nn.Module, inputs: Any, output: tuple[Tensor, ...]) -> None:
        """The hook on the module that embeds the time."""
        self._embedding = output[0]

    def give(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The hook on the norm's place; the network's own norm gets what it always gets."""
        embedding, self._embedding = self._embedding, None
        if not (isinstance(module, SwitchedNorm) and module.student):
            return inputs
        assert embedding is not None, "the time is embedded before"
        return (*inputs, embedding)
