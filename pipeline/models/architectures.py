"""The table of published architectures."""

from dataclasses import dataclass
from pathlib import Path

MINI = Path(__file__).parents[1] / "mini"


@dataclass(frozen=True)
class Arch:
    """One row of the table of architectures."""

    open_clip: str
    """Name of open_clip's configuration. OpenAI's weights need the `-quickgelu` ones: the plain ones (`ViT-B-32`) build
    GELU, which loads without an error and gives wrong features."""
    pretrained_repo: str | None = None
    """Hugging Face model whose image tower the experts were fine-tuned from."""
    expert_repo: str | None = None
    """Hugging Face models of the experts; `{}` stands for the task's suffix."""
    folder: Path | None = None
    """Folder of checkpoints in the package."""
    config: Path | None = None
    """open_clip configuration in the package; None if open_clip has it."""


ARCHS: dict[str, Arch] = {
    "mini": Arch("mini", folder=MINI / "weights", config=MINI / "mini.json"),
    "vitb32": Arch("ViT-B-32-quickgelu", "openai/clip-vit-base-patch32", "tanganke/clip-vit-base-patch32_{}"),
    "vitb16": Arch("ViT-B-16-quickgelu", "openai/clip-vit-base-patch16", "tanganke/clip-vit-base-patch16_{}"),
    "vitl14": Arch("ViT-L-14-quickgelu", "openai/clip-vit-large-patch14", "tanganke/clip-vit-large-patch14_{}"),
}


def model_arch(model: str) -> Arch:
    """A model without a row of its own: the weights of a row with the same model are its."""
    known = next((row.pretrained_repo for row in ARCHS.values() if row.open_clip == model), None)
    return Arch(model, known)
