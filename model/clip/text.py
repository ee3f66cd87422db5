"""Text banks: one L2-normalised embedding per text."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from torch import Tensor, nn

from util.errors import UserError
from util.files import load_tensors, save_tensors

FOREGROUND = "a photo of {}."
BACKGROUND = "a photo without {}."


class TextEncoder(nn.Module):
    """CLIP's text tower with its tokenizer.

    `known_ids` (optional, int64) lists the BPE ids that have an embedding: a tiny CLIP stores only those it was trained on.
    """

    def __init__(self, clip: nn.Module, known_ids: Tensor | None = None):
        super().__init__()
        self.clip = clip
        self.tokenizer = SimpleTokenizer(context_length=clip.context_length)
        self.known_ids = None if known_ids is None else set(known_ids.tolist())

    def forward(self, texts: Sequence[str]) -> Tensor:
        """n texts -> n D fp32, L2-normalised. Raises UserError as `tokens`."""
        return F.normalize(self.clip.encode_text(self.tokens(texts)).float(), dim=-1)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """n texts -> n L int64, L the context; zeros behind each end.

        Raises:
            UserError: a text is longer than the context, or uses a word that this CLIP has no embedding for.
        """
        for text in texts:
            ids = self.tokenizer.encode(text)
            if len(ids) + 2 > self.clip.context_length:
                raise UserError(f"text of {len(ids)} tokens does not fit CLIP's {self.clip.context_length}: {text!r}")
            unknown = [] if self.known_ids is None else [i for i in ids if i not in self.known_ids]
            if unknown:
                words, known = (sorted(filter(str.isalpha, (self.tokenizer.decode([i]).strip() for i in some)))
                                for some in (unknown, self.known_ids))  # fmt: skip
                raise UserError(f"this small CLIP does not know {', '.join(words)} (in {text!r}); all its words: "
                                f"{', '.join(known)}. For photographs take a full CLIP, and a system trained with it")
        return self.tokenizer(list(texts)).to(self.clip.positional_embedding.device)

    @torch.no_grad()
    def bank(self, names: Sequence[str | Sequence[str]], templates: Sequence[str] = ("{}",), cache: Path | None = None) -> Tensor:
        """One embedding per class: n D fp32, L2-normalised; n may be 0.

        Every template is filled with every name of a class; the embeddings are averaged and normalised again.

        Args:
            names: a name of each class, or several synonyms. Background names are further classes.
            templates: texts with one "{}". Without any, the names are the texts.
            cache: folder where the bank is kept under a hash of its texts and the tower's weights.
        """
        synonyms = [[name] if isinstance(name, str) else list(name) for name in names]
        if empty := [i for i, some in enumerate(synonyms) if not some]:
            raise UserError(f"class {empty[0]} of {len(synonyms)} has no name; give every class one")
        rows = [[template.format(name) for template in templates for name in some] for some in synonyms]
        file = cache and cache / f"text-{self.key(rows)}.safetensors"
        if file and file.is_file():
            return load_tensors(file)["bank"].to(self.clip.positional_embedding.device)
        texts = [text for row in rows for text in row]
        none = self.clip.text_projection.new_zeros(0, self.clip.text_projection.shape[1])
        found = torch.cat([none, *(self(texts[i : i + 64]) for i in range(0, len(texts), 64))])
        bank = [x[0] if len(x) == 1 else F.normalize(x.mean(0), dim=0) for x in found.split([len(row) for row in rows])]
        result = torch.stack(bank) if bank else none
        if file:
            save_tensors(file, {"bank": result})
        return result

    @property
    def settings(self) -> str:
        """Settings that change embeddings besides the tensors: the activation's name."""
        return type(self.clip.transformer.resblocks[0].mlp.gelu).__name__

    def knows(self, text: str) -> bool:
        """Return whether every word of a text has an embedding."""
        return self.known_ids is None or self.known_ids.issuperset(self.tokenizer.encode(text))

    def key(self, rows: Sequence[Sequence[str]]) -> str:
        """Return a hash of rows of texts and of the tower that embeds them."""
        digest = hashlib.sha256(json.dumps([self.settings, rows]).encode())
        for name, tensor in sorted(self.clip.state_dict().items()):
            if not name.startswith("visual."):
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]
