"""Token ids of a suite's requests, kept on disk because every cell of a study scores the same texts.

A file's name is the sha256 of everything that decides the ids: the texts, the tokenizer's whole definition and the
versions of the libraries. A file that cannot be read is encoded and written again; all may be deleted at any time.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Pair = tuple[list[int], list[int]]  # ids of a context, ids of its continuation


class KeptTokens:
    """The files of `folder` for one tokenizer; `settings` are the others (JSON) that decide how lm-eval encodes."""

    def __init__(self, folder: Path, tokenizer: Any, settings: Any):
        self.folder = Path(folder)
        # a tokenizer without a Rust half is Python code, which has no definition to hash: nothing of it is kept
        half = getattr(tokenizer, "backend_tokenizer", None)
        versions = [version(name) for name in ("lm_eval", "tokenizers", "transformers")]
        self.definition = ""
        if half:
            split = getattr(tokenizer, "split_special_tokens", None)  # a setting that is not in the Rust half
            own = [type(tokenizer).__name__, half.to_str(), tokenizer.special_tokens_map, split]
            self.definition = json.dumps([*own, settings, versions], default=str)

    def load(self, texts: Sequence[tuple[str, str]]) -> list[Pair] | None:
        """The ids of each (context, continuation), None where they are not kept or the file is damaged."""
        if not self.definition:
            return None
        try:
            with np.load(self._file(texts), allow_pickle=False) as kept:  # zip's checksums are compared on reading
                ids, lengths = kept["ids"], kept["lengths"]
            if lengths.shape != (len(texts), 2) or lengths.min(initial=0) < 0 or lengths.sum() != len(ids):
                return None
        except Exception:  # a damaged archive fails in a dozen ways, and is made again
            return None
        pieces = [piece.tolist() for piece in np.split(ids, lengths.ravel().cumsum()[:-1])]
        return list(zip(pieces[::2], pieces[1::2], strict=True))

    def save(self, texts: Sequence[tuple[str, str]], pairs: Sequence[Pair]) -> None:
        """Keep `pairs`, the ids of `texts`, for the next model."""
        if not self.definition:
            return
        file = self._file(texts)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")  # cells may be scored side by side
        ids = np.array([i for pair in pairs for piece in pair for i in piece], dtype=np.int32)
        lengths = np.array([[len(piece) for piece in pair] for pair in pairs], dtype=np.int64)
        with open(part, "wb") as stream:
            np.savez(stream, ids=ids, lengths=lengths)
        part.replace(file)

    def _file(self, texts: Sequence[tuple[str, str]]) -> Path:
        return self.folder / f"{hashlib.sha256(json.dumps([self.definition, texts]).encode()).hexdigest()}.npz"
