"""One picture, one tensor: every route decodes alike, and as the loaders do that the encoders were trained with."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from probsurgery.pipeline.datasets.corruptions import corrupted
from probsurgery.pipeline.datasets.pictures import read_rgb, to_rgb
from probsurgery.pipeline.datasets.suites import select_tasks
from probsurgery.pipeline.datasets.tasks import open_images
from probsurgery.pipeline.models.encoders import get_encoder
from support import parquet

(EUROSAT,) = select_tasks("clip8", ["eurosat"])
SIZE = get_encoder("mini").preprocessing.image_size
MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def openais(image):
    """OpenAI's transform, which converts after resizing."""
    resize = [Resize(SIZE, interpolation=InterpolationMode.BICUBIC), CenterCrop(SIZE)]
    return Compose([*resize, lambda i: i.convert("RGB"), ToTensor(), Normalize(*MEAN_STD)])(image)


def photograph(mode="RGB", size=(70, 50)):
    """Noise, smooth enough for a JPEG, in any mode."""
    values = np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8)
    image = Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)


def palette(**transparency):
    image = photograph().quantize(16)
    image.info |= transparency
    return image


PICTURES = {
    "palette.png": palette,
    "palette of transparent colours.png": lambda: palette(transparency=bytes(range(0, 160, 10))),
    "one transparent colour.png": lambda: palette(transparency=3),
    "alpha.png": lambda: photograph("RGBA"),
    "grey and alpha.png": lambda: photograph("RGBA").convert("LA"),
    "two levels.png": lambda: photograph("1"),
    "cmyk.jpg": lambda: photograph("CMYK"),
    "cmyk.tif": lambda: photograph("CMYK"),
    "palette.bmp": palette,
    "grey.jpg": lambda: photograph("L"),
}
"""A picture for each class of EuroSAT."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pictures in class folders of EuroSAT, and in a Parquet file."""
    root = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, (file, make) in zip(EUROSAT.aliases, PICTURES.items(), strict=True):
        paths.append(root / "folders" / "eurosat" / "test" / name / file)
        paths[-1].parent.mkdir(parents=True)
        make().save(paths[-1])
    parquet(root / "table" / "eurosat", [path.read_bytes() for path in paths], list(range(10)))
    return root, paths


def test_every_route_gives_the_tensor_of_the_reference_loader(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))
    root, paths = folder
    transform = get_encoder("mini").preprocessing.transform
    routes = [open_images(EUROSAT, "test", str(root / kind), any_rows=True) for kind in ("folders", "table")]
    rows = {label: row for row, label in enumerate(routes[0].labels.tolist())}
    for label, path in enumerate(paths):
        with warnings.catch_warnings(action="ignore"):  # of transparent colours
            expected = openais(pil_loader(path))
        assert torch.equal(transform(routes[0].decode(rows[label])), expected), path.name
        assert torch.equal(transform(routes[1].decode(label)), expected), path.name
        with Image.open(path) as image:  # as `load_model().transform` gets it
            assert torch.equal(transform(image), expected), path.name
        assert torch.equal(transform(read_rgb(path.read_bytes())), expected), path.name


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(70, 50), (31, 200), (SIZE, SIZE), (5, 3)])
def test_plain_pictures_are_preprocessed_as_openai_does(mode, size):
    image = photograph(mode, size)
    assert torch.equal(get_encoder("mini").preprocessing.transform(image), openais(image))


LEVELS = np.tile(np.arange(256, dtype=np.uint16) * 257, (64, 1))
GREY = Image.fromarray(LEVELS.astype(np.uint8))


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of_12_bits(values):
    """A TIFF with one strip of 12-bit levels, two in three bytes, which Pillow reads and does not write."""
    height, width = values.shape
    first, second = (values.reshape(-1, 2) >> 4).T
    strip = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


def white_is_zero(content):
    """A TIFF of 16 bits whose tag says that 0 is white."""
    tag = content.index(bytes([6, 1, 3, 0, 1, 0, 0, 0]))
    return content[: tag + 8] + b"\0\0" + content[tag + 10 :]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.fromarray(LEVELS), "PNG"), GREY),
        (encoded(Image.fromarray(LEVELS), "TIFF"), GREY),
        (encoded(Image.fromarray(LEVELS.astype(">u2")), "TIFF"), GREY),
        (encoded(Image.fromarray(LEVELS), "TIFF", compression="tiff_lzw"), GREY),
        (b"P5 %d %d 65535\n" % LEVELS.shape[::-1] + LEVELS.astype(">u2").tobytes(), GREY),
        (encoded(Image.fromarray(LEVELS), "JPEG2000"), GREY),
        (of_12_bits(LEVELS), GREY),
        (encoded(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"), GREY),
        (white_is_zero(encoded(Image.fromarray(LEVELS), "TIFF")), Image.fromarray(255 - np.asarray(GREY))),
    ],
    ids=[
        "png",
        "tiff",
        "tiff big-endian",
        "tiff lzw",
        "pgm",
        "jpeg 2000",
        "tiff of 12 bits",
        "32 bits",
        "white is zero",
    ],
)
def test_16_bits_are_scaled_to_8(content, expected):
    assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(expected.convert("RGB")))
    with Image.open(io.BytesIO(content)) as image:
        assert torch.equal(get_encoder("mini").preprocessing.transform(image), openais(expected))


def test_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 385, 386, 65406, 65407, 65535]], np.uint16)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 1, 2, 254, 255, 255]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (LEVELS.astype(np.float32) / 65535, r"floats \(mode F\), .*; save it with 8 or 16 bits"),
        (LEVELS.astype(np.int32) * 2, r"beyond 16 bits \(mode I\), .*; save it with 8 or 16 bits"),
        (LEVELS.astype(np.int32) - 1, r"signed or .* \(mode I\)"),
    ],
)
def test_what_has_no_known_black_and_white_is_refused(values, words):
    for image in (Image.fromarray(values), Image.open(io.BytesIO(encoded(Image.fromarray(values), "TIFF")))):
        for decode in (to_rgb, get_encoder("mini").preprocessing.transform, lambda i: corrupted(i, "noise:1", 0)):
            with pytest.raises(ValueError, match=words):
                decode(image)


def turned(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(photograph(), kind, exif=exif) if kind != "TIFF" else encoded(photograph(), kind, tiffinfo=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_the_orientation_is_honoured_once(kind, orientation):
    """Against arrays: rows and columns of the picture as the EXIF standard (2.32, 4.6.4) places them."""
    stored = np.asarray(Image.open(io.BytesIO(turned(kind, 1))).convert("RGB"))
    upright = stored if orientation < 5 else stored.transpose(1, 0, 2)
    vertically, horizontally = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    upright = upright[:: -1 if vertically else 1, :: -1 if horizontally else 1]
    rgb = read_rgb(turned(kind, orientation))
    assert np.array_equal(np.asarray(rgb), upright)
    assert np.array_equal(np.asarray(to_rgb(rgb)), upright)
    assert np.array_equal(np.asarray(to_rgb(Image.open(io.BytesIO(turned(kind, orientation))))), upright)


def test_the_orientation_of_xmp_is_honoured():
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    plain = encoded(photograph(), "JPEG")
    rotated = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + plain[2:]
    assert np.array_equal(np.asarray(read_rgb(rotated)), np.rot90(np.asarray(read_rgb(plain)), -1))


@pytest.mark.parametrize("damage", [b"garbage", b"II*\0\xff\xff\xff\x7f", b"MM\0*\0\0\0\x08\xff\xff", b"MM\0*\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_metadata_say_nothing(kind, damage, recwarn):
    content = encoded(photograph(), kind, exif=b"Exif\0\0" + damage)
    assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(read_rgb(encoded(photograph(), kind))))
    assert not recwarn.list


def test_the_first_of_several_frames_is_used():
    first, second = photograph(), photograph().rotate(180)
    for kind in ("TIFF", "PNG"):
        content = encoded(first, kind, save_all=True, append_images=[second])
        assert np.array_equal(np.asarray(read_rgb(content)), np.asarray(first))


@pytest.mark.parametrize(("content", "words"), [(b"", "it is empty"), (b"<html>", "not a picture in a known format")])
def test_what_is_no_picture_is_called_so(content, words):
    with pytest.raises(ValueError, match=words):
        read_rgb(content)
