"""Two tasks of one's own: drawn images, and a small encoder with an expert of each, trained in seconds."""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file

CONFIG = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "mlp_ratio": 2.0, "patch_size": 8},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
CLASSES = {"pets": ("cat", "dog"), "birds": ("crow", "gull")}
TEMPLATE = "a photo of a {}, a type of bird."
ROWS = {"train": 24, "test": 20}
STEPS = 60


def draw(name: str, generator: torch.Generator) -> Image.Image:
    """An image of a class: a large disc or a small one, or stripes in one of two directions; the rest is random."""
    place, *shades = torch.randint(0, 255, (7,), generator=generator).tolist()
    image = Image.new("RGB", (32, 32), tuple(shade // 3 for shade in shades[:3]))
    pen, colour = ImageDraw.Draw(image), tuple(128 + shade // 2 for shade in shades[3:])
    if name in CLASSES["pets"]:
        width, left, top = 20 if name == "cat" else 8, place % 11, place % 9
        pen.ellipse((left, top, left + width, top + width), fill=colour)
    else:
        for step in range(place % 4, 32, 6):
            pen.line((0, step, 31, step) if name == "crow" else (step, 0, step, 31), fill=colour, width=3)
    return image


def make(folder: Path) -> None:
    """Write `data/<task>/<split>/<class>/`, `encoder.json`, `base.safetensors` with a text tower, an expert of each
    task, and for pets the classifier that it was trained with: it has a bias and takes plain features."""
    (folder / "encoder.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    base = open_clip.CLIP(**CONFIG)
    save_file({name: tensor.contiguous() for name, tensor in base.state_dict().items()}, folder / "base.safetensors")
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    text = open_clip.build_zero_shot_classifier(base, tokenizer, CLASSES["birds"], [TEMPLATE])
    scaled = base.logit_scale.exp().detach() * text
    layer = torch.nn.Linear(CONFIG["embed_dim"], 2)
    logits = {"pets": layer, "birds": lambda features: F.normalize(features, dim=-1) @ scaled}
    transform = open_clip.image_transform(CONFIG["vision_cfg"]["image_size"], False)
    for task, names in CLASSES.items():
        generator, images = torch.Generator().manual_seed(len(task)), []
        for split, rows in ROWS.items():
            for number in range(rows):
                place = folder / "data" / task / split / names[number % 2]
                place.mkdir(parents=True, exist_ok=True)
                image = draw(names[number % 2], generator)
                image.save(place / f"{number}.png")
                images += [image] if split == "train" else []
        tower = open_clip.CLIP(**CONFIG).visual
        tower.load_state_dict(base.visual.state_dict())
        pixels, labels = torch.stack([transform(image) for image in images]), torch.arange(len(images)) % 2
        optimiser = torch.optim.AdamW([*tower.parameters(), *layer.parameters()], lr=2e-3)
        for _ in range(STEPS):
            optimiser.zero_grad()
            F.cross_entropy(logits[task](tower(pixels)), labels).backward()
            optimiser.step()
        save_file(tower.state_dict(), folder / f"{task}.safetensors")
        if task == "pets":  # the other task goes on training it
            layer.requires_grad_(False)
            save_file({"weight": layer.weight.data, "bias": layer.bias.data}, folder / "pets_head.safetensors")
