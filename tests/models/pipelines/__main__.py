"""Prints how far fewstep's teachers are from diffusers' pipelines: `python -m pipelines`, in tests/models."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from pipelines.compare import CASES, SIZES, compared

print("| pipeline | latents, cells | guidance | largest difference of latents | of pixels, levels |")
print("|---|---|---|---|---|")
for case in CASES:
    with TemporaryDirectory() as place:
        folder = Path(place)
        case.write(folder)
        for size in SIZES:
            for scale in case.guidance_scales:
                found = compared(case, folder, size, scale)
                print(
                    f"| {case.name} | {size[0]}×{size[1]} | {scale:g} | {found.latents:.1e} | {found.levels} |",
                    flush=True,
                )
