#!/usr/bin/env bash
# Pillow 13.0.0: the size of a TIFF file whose orientation stands in its XMP packet changes when the pixels are loaded.
#
# One would guess: since `Image.open` gives TIFF files with an orientation tag the size they have when they are upright,
#   and `load` turns them, the size is the same before and after `load`, wherever the orientation is written.
# What happens: with the tag, yes. With the orientation in XMP alone, `open` gives the stored size, (6, 2), and `load`
#   turns the picture all the same: (2, 6). Who sorts pictures by the aspect ratio in the header, as trainers with
#   buckets do, sorts these wrongly. JPEG and PNG files keep the stored size, and are never turned by `load`.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0
cat > "$folder/try.py" <<'P'
import io
import PIL
from PIL import Image

XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def sizes(kind, **options):
    file = io.BytesIO()
    Image.new("RGB", (6, 2)).save(file, kind, **options)
    image = Image.open(file)
    before = image.size
    image.load()
    return before, image.size


print("Pillow", PIL.__version__)
print("TIFF, tag", *sizes("TIFF", tiffinfo={274: 6}))
print("TIFF, XMP", *sizes("TIFF", tiffinfo={700: XMP}))
print("JPEG, XMP", *sizes("JPEG", xmp=XMP))
P
"$folder/venv/bin/python" "$folder/try.py" | tee "$folder/seen"
diff "$folder/seen" - <<'SEEN'
Pillow 13.0.0
TIFF, tag (2, 6) (2, 6)
TIFF, XMP (6, 2) (2, 6)
JPEG, XMP (6, 2) (6, 2)
SEEN
