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
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
CLASSES = {"discs": ("large", "small"), "stripes": ("across", "down")}
ROWS = {"train": 24, "test": 20}


def draw(task: str, name: str, generator: torch.Generator) -> Image.Image:
    """An image of a class, at a random place and in random colours."""
    place, *shades = torch.randint(0, 255, (7,), generator=generator).tolist()
    image = Image.new("RGB", (32, 32), tuple(shade // 3 for shade in shades[:3]))
    pen, colour = ImageDraw.Draw(image), tuple(128 + shade // 2 for shade in shades[3:])
    if task == "discs":
        width = 20 if name == "large" else 8
        corner = place % 11, place % 9
        pen.ellipse((*corner, corner[0] + width, corner[1] + width), fill=colour)
    else:
        for step in range(place % 4, 32, 6):
            pen.line((0, step, 31, step) if name == "across" else (step, 0, step, 31), fill=colour, width=3)
    return image


def make(folder: Path) -> None:
    """Write `data/<task>/<split>/<class>/`, `encoder.json`, `base.safetensors`, and for each task an expert and a
    classifier with a bias of plain features."""
    (folder / "encoder.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    base = open_clip.CLIP(**CONFIG).visual
    save_file(base.state_dict(), folder / "base.safetensors")
    for task, names in CLASSES.items():
        generator, images, labels = torch.Generator().manual_seed(len(task)), [], []
        for split, rows in ROWS.items():
            for number in range(rows):
                name = names[number % 2]
                place = folder / "data" / task / split / name
                place.mkdir(parents=True, exist_ok=True)
                image = draw(task, name, generator)
                image.save(place / f"{number}.png")
                if split == "train":
                    images.append(image)
                    labels.append(number % 2)
        tower = open_clip.CLIP(**CONFIG).visual
        tower.load_state_dict(base.state_dict())
        head = torch.nn.Linear(CONFIG["embed_dim"], len(names))
        transform = open_clip.image_transform(CONFIG["vision_cfg"]["image_size"], False)
        pixels, targets = torch.stack([transform(image) for image in images]), torch.tensor(labels)
        optimiser = torch.optim.AdamW([*tower.parameters(), *head.parameters()], lr=2e-3)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(head(tower(pixels)), targets).backward()
            optimiser.step()
        save_file(tower.state_dict(), folder / f"{task}.safetensors")
        save_file({"weight": head.weight.data, "bias": head.bias.data}, folder / f"{task}_head.safetensors")
