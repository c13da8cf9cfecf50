"""A teacher of one's own: a small convolutional velocity network that is in no library.

    jobs/train_teacher.py --set network.module=jobs/examples/own_teacher.py --set network.family=conv_flow \\
        --set 'network.config={width: 64, depth: 6}'
    jobs/distill_qwen.py --set teacher.module=jobs/examples/own_teacher.py --set teacher.family=conv_flow \\
        --set 'student.lora={rank: 48}' --set teacher.path=.fewstep/models/RUN

docs/tutorials/own_teacher.md explains every line.
"""

import torch
from torch import Tensor, nn

from fewstep.models import ModuleFamily, register
from fewstep.models.conditioning import TextConditioning
from fewstep.models.module_family import time_features


class ConvFlow(nn.Module):
    """Residual convolutions, shifted by the time and by the mean of the caption's token states."""

    def __init__(self, width: int = 64, depth: int = 6, text_width: int = 384) -> None:
        super().__init__()
        self.width = width
        self.into = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(width + text_width, width) for _ in range(depth))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, text: TextConditioning) -> Tensor:
        """Velocity (B, 3, H, W) at the state x (B, 3, H, W) and the time t (B,) in [0, 1]."""
        caption = text.states.sum(1) / text.mask.sum(1, keepdim=True).clamp(min=1)
        condition = torch.cat([time_features(t, self.width), caption], dim=1).to(x)
        hidden = self.into(x)
        for block, shift in zip(self.blocks, self.shifts, strict=True):
            hidden = hidden + block(nn.functional.silu(hidden + shift(condition)[:, :, None, None]))
        return self.out(hidden)


register(ModuleFamily("conv_flow", ConvFlow, projection="out", channels=3, width=384))
