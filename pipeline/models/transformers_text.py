"""Text towers of transformers' CLIP and SigLIP models, with the tokenizers that they were trained with."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probsurgery.pipeline import hub
from probsurgery.pipeline.errors import InputError, first_line
from probsurgery.pipeline.fingerprints import file_digest
from probsurgery.pipeline.models.checkpoints import digest
from probsurgery.pipeline.models.encoders import Encoder
from probsurgery.pipeline.models.transformers_config import CONFIG, read_json_object, require_transformers

TOKENIZER = ("tokenizer.json", "vocab.json", "spiece.model")
"""Files of which a folder with a tokenizer has at least one."""
_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "merges.txt")


class TransformersText(nn.Module):
    """A text tower and its tokenizer, under the names that open_clip's classifiers are built by."""

    def __init__(self, encoder: Encoder, pretrained: Path) -> None:
        """The text tower of the model beside the pre-trained checkpoint, or of the encoder's own folder.

        Raises `InputError` if neither has one that goes with the encoder's features.
        """
        super().__init__()
        transformers, folder = require_transformers(), _folder(encoder, pretrained)
        try:
            with _quiet(transformers):
                kind = read_json_object(folder, CONFIG)["model_type"]
                self.model = getattr(transformers, _MODELS[kind]).from_pretrained(folder, local_files_only=True)
                self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # transformers' own, of many kinds
            raise InputError(f"the text tower of {folder} cannot be read: {first_line(error)}; {_ADVICE}") from None
        self.model = self.model.float().eval().requires_grad_(False)
        text = {n: t for n, t in self.model.state_dict().items() if n.startswith("text_")}
        files = [file_digest(folder / name) for name in (*TOKENIZER, *_BESIDE_TOKENIZER) if (folder / name).is_file()]
        self.digest, self.tokenizer_digests = digest({**text, "logit_scale": self.model.logit_scale.detach()}), files
        self.logit_scale = self.model.logit_scale
        self.dim = int(self.encode_text(self.tokens(["a"])).shape[1])
        if self.dim != encoder.dim:
            problem = f"the text tower of {folder} gives {self.dim} numbers, and {encoder.name} gives {encoder.dim}"
            raise InputError(f"{problem}, without its projection or with another pooling; {_ADVICE}")

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token numbers (B, length), padded and cut to the tower's length."""
        length = self.model.config.text_config.max_position_embeddings
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
        return self._tokenizer(list(texts), return_tensors="pt", **options)["input_ids"]

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Features (B, d) of texts."""
        output = self.model.get_text_features(input_ids=tokens)
        features = getattr(output, "pooler_output", output)
        return F.normalize(features, dim=-1) if normalize else features


_ADVICE = "name a file by `classifier` in the suite, or put classifiers.safetensors into --checkpoints"


def _folder(encoder: Encoder, pretrained: Path) -> Path:
    """The folder of a whole model with a tokenizer."""
    folders = [pretrained.parent]
    if encoder.own_weights is not None:
        if (repo := encoder.arch.pretrained_repo) is not None:
            for names in (TOKENIZER, *((name,) for name in _BESIDE_TOKENIZER)):
                with suppress(InputError):  # it is said below what is missing
                    hub.download(repo, "--arch", names)
        folders.append(encoder.own_weights().parent)
    for folder in folders:
        if not (folder / CONFIG).is_file():
            continue
        if read_json_object(folder, CONFIG).get("model_type") in _MODELS:
            if any((folder / name).is_file() for name in TOKENIZER):
                return folder
            raise InputError(f"{folder} has no tokenizer ({TOKENIZER[0]}) to make classifiers with; {_ADVICE}")
    raise InputError(f"{encoder.name} has no text tower to make classifiers with; {_ADVICE}")


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and notes, which are about its own files."""
    logging = transformers.utils.logging
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
