"""Vectors of item texts from the frozen LLM as it is: what text-aware ID models, neighbours and text rivals start from.

An item's vector is the mean of the LLM's outputs over the item's own text, centred and whitened, at one depth or at
several side by side. Nothing is trained and nothing but the catalogue is read. On amazon-scientific it finds the next
item far better than the output at a last [EOS] does (dev/LOG.md).
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from laserrec.config import BackboneConfig, ItemVectors, PromptConfig
from laserrec.data.extras import VECTOR, vectors_of
from laserrec.data.prompt import PromptEncoder
from laserrec.llm.backbone import Backbone, load_backbone
from laserrec.llm.precision import resolve_precision
from laserrec.llm.weights import find_weights, load_tokenizer
from laserrec.llm.whitening import fit_whitening, whiten
from laserrec.util import checkpoint
from laserrec.util.device import move
from laserrec.util.distributed import World
from laserrec.util.errors import UserError
from laserrec.util.io import in_turn
from laserrec.util.memory import available_bytes
from laserrec.util.progress import Progress

_DIMS = 512
_MAX_TOKENS = 64
"""Of one item's text; read once per catalogue, it may be longer than what every history repeats."""
_AT_ONCE = 64
"""Texts per pass of the LLM."""
_COPIES = 3
"""Of the means, that reading and whitening hold at once."""
_KEPT_BYTES = 2**28
"""Means no larger than this stay in memory: an ID model, Laser and its rivals all want those of one catalogue, and
reading it takes minutes."""


class TextFeatures:
    """What the frozen LLM of `config` makes of item texts, on `device`. Every text is read once: means are kept in
    memory (those of the last catalogue) and, where `folder` is given, in FOLDER/FINGERPRINT.safetensors.

    Where the folder holds what is asked for, the LLM's weights are hashed but not loaded. backbone: the LLM, if it is
    loaded already. world: processes that read a catalogue together, each its share; all of them call each method at
    the same place. trust_remote_code: as in load_backbone.
    """

    def __init__(
        self, config: BackboneConfig, prompt: PromptConfig, device: torch.device, folder: Path | None = None,
        progress: bool = False, backbone: Backbone | None = None, world: World | None = None,
        trust_remote_code: bool = False,
    ):
        self.config = config if backbone is None else backbone.config
        self.prompt, self.device, self.folder, self.progress = prompt, device, folder, progress
        self.world, self._loaded, self.trust_remote_code = world or World(), backbone, trust_remote_code
        self._expected: tuple[str, str] | None = None
        self._kept: dict[str, Tensor] = {}
        self._known: dict[bytes, int] = {}
        self._known_means = torch.zeros(0)

    @property
    def backbone(self) -> Backbone:
        """The LLM, loaded at the first use. Raises UserError if it can't be, or if its weights are not the expected
        ones (`expect`)."""
        if self._loaded is None:
            self._loaded = load_backbone(self.config, self.device, trust_remote_code=self.trust_remote_code)
            self._check(self._loaded.sha256)
        return self._loaded

    @property
    def sha256(self) -> str:
        """Of the LLM's weight files."""
        if not self._sha256:
            self._sha256 = self.backbone.sha256  # loading brings the weights here
        return self._sha256

    def expect(self, sha256: str | None, model: str) -> None:
        """From now on only an LLM of this sha256 will do, since `model` was fitted with it; None or "": any. Raises
        UserError if another one is loaded already."""
        self._expected = (sha256, model) if sha256 else None
        if self._loaded is not None:
            self._check(self._loaded.sha256)

    def _check(self, sha256: str) -> None:
        if self._expected is None or sha256 == self._expected[0]:
            return
        found = f"{sha256[:12]}..." if sha256 else "no weight files that could be checked"
        raise UserError(f"{self._expected[1]} was fitted with an LLM of sha256 {self._expected[0][:12]}..., but "
                        f"{self.config.name} here has {found}; the model means nothing to other weights. Get the "
                        "weights it was fitted with, or fit again on these")

    def parts(self, items: pl.DataFrame) -> int:
        """How many equally wide parts stand side by side in `means`: one for each depth of the LLM, and one for the
        items' own vectors."""
        depths, own = max(1, len(self.config.mean_layers)), self._takes_vectors(items)
        return int(own) if own and self.config.item_vectors == ItemVectors.INSTEAD else depths + own

    def means(self, items: pl.DataFrame) -> Float[Tensor, "n_items d_means"]:
        """What is known of each item before anything is trained: the LLM's mean outputs over its text, the item's own
        vector, or both side by side (backbone.item_vectors). Parts are padded with zeros to equal width. An item
        without a vector of its own has NaN there, which whitening turns into zeros.

        float32 on the device. Raises UserError if the LLM can't be loaded, and for item_vectors "instead" where the
        items have no vectors.
        """
        instead = self.config.item_vectors == ItemVectors.INSTEAD
        if not self._takes_vectors(items):
            if instead:
                raise UserError("backbone.item_vectors is instead, and the data folder has no vectors of items; "
                                "prepare it again with vectors")
            return self.llm_means(items)
        found = vectors_of(items)
        assert found is not None
        own = move(torch.from_numpy(found), self.device)
        return own if instead else _side_by_side(self.llm_means(items), max(1, len(self.config.mean_layers)), own)

    def _takes_vectors(self, items: pl.DataFrame) -> bool:
        return self.config.item_vectors != ItemVectors.NONE and VECTOR in items.columns

    def llm_means(self, items: pl.DataFrame) -> Float[Tensor, "n_items d_means"]:
        """Per row of `items` (columns title and the prompt's attributes), the mean of the LLM's outputs over the item's
        line, read alone; behind each of backbone.mean_layers, side by side, or behind the last layer that is used.

        The first token is left out: attention parks what it has no use for there, and its output tells little of the
        item. float32 on the device. Raises UserError if the LLM can't be loaded or the folder can't be written.
        """
        lines = self._encoder.item_tokens(items)
        key = self._fingerprint(lines)
        if key not in self._kept:
            means = self._from_world(key, lines) if lines else torch.empty(0, self.backbone.d_means, device=self.device)
            self._kept = {key: means}
        means = self._kept[key]
        if means.nbytes > _KEPT_BYTES:
            self._kept = {}
        return means.clone()

    def vectors(self, items: pl.DataFrame, fit_rows: int | None = None) -> Float[Tensor, "n_items d_text"]:
        """`means`, each part centred and whitened with the mean and covariance of the first `fit_rows` rows (None:
        all), the directions of largest variance first; at most 512 dimensions for each part."""
        return whitened(self.means(items), self.parts(items), fit_rows)

    def kept_in(self, folder: Path | None) -> TextFeatures:
        """The same with another folder, and the LLM shared if it is loaded."""
        other = copy.copy(self)
        other.folder = folder
        return other

    def knowing(self, items: pl.DataFrame, means: Float[Tensor, "n_items d_means"]) -> TextFeatures:
        """The same, without a folder, that does not read texts whose means are given, from the same LLM. They may
        differ in the last bits from what a reading of another catalogue finds, so that none of this is kept on disk."""
        other = self.kept_in(None)
        other._kept = {}
        other._known = {line.tobytes(): row for row, line in enumerate(self._encoder.item_tokens(items))}
        other._known_means = means
        return other

    @cached_property
    def _encoder(self) -> PromptEncoder:
        tokenizer = (load_tokenizer(self.config, self.trust_remote_code) if self._loaded is None
                     else self._loaded.tokenizer)
        return PromptEncoder(tokenizer, self.prompt.model_copy(update={"max_item_tokens": _MAX_TOKENS}))

    @cached_property
    def _sha256(self) -> str:
        """Of the LLM's weight files, found without loading them; "" if they are not on this machine yet."""
        return find_weights(self.config).sha256 if self._loaded is None else self._loaded.sha256

    def _fingerprint(self, lines: list[np.ndarray]) -> str:
        """sha256 over all that the means depend on."""
        self._check(self.sha256)  # before a kept file is taken, which saves the loading
        config = self.config
        settings = {"weights": self.sha256, "depths": list(config.mean_layers) or config.layers,
                    "precision": str(resolve_precision(config.precision, self.device)),
                    "quantization": str(config.quantization)}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for line in lines:
            digest.update(len(line).to_bytes(4, "little") + line.astype("<i4").tobytes())
        return digest.hexdigest()

    def _from_world(self, key: str, lines: list[np.ndarray]) -> Tensor:
        """In the first process from the file, if it is there; else read by all processes, and written by the first."""
        if self._known:
            return self._with_known(lines)
        if self.folder is None or not self._sha256:
            return self._read(lines)
        path = self.folder / f"{key}.safetensors"

        def kept() -> Tensor | None:
            found, there = self.world.from_main(lambda: _load(path, key, len(lines)))
            return move(found["means"], self.device) if there else None

        if (means := kept()) is not None:
            return means
        # Of several runs that want the same file one reads the texts; the others wait for it and take the file.
        turn = in_turn(path.with_name(f".{path.name}.lock"), f"reads item texts into {path}", "folder of text features",
                       "give another one")
        with turn if self.world.is_main else nullcontext():
            if (means := kept()) is not None:  # another run wrote it while this one waited
                return means
            means = self._read(lines)
            if self.world.is_main:
                checkpoint.save(path, {"means": means}, {"fingerprint": key})
            return means

    def _read(self, lines: list[np.ndarray]) -> Tensor:
        needed, free = _COPIES * 4 * len(lines) * self.backbone.d_means, available_bytes()
        if self.device.type == "cpu" and needed > free:
            raise UserError(f"the text vectors of {len(lines):,} items take {needed / 1e9:,.1f} GB of memory and "
                            f"{free / 1e9:,.1f} GB are free; set fewer backbone.mean_layers or use a larger machine")
        with Progress("reading item texts", len(lines), self.progress) as bar:
            return _means(self.backbone, lines, bar.advance, self.world)

    def _with_known(self, lines: list[np.ndarray]) -> Tensor:
        """The means of all lines, of which only those without known means are read."""
        rows = torch.tensor([self._known.get(line.tobytes(), -1) for line in lines])
        out = self._known_means[rows.clamp(min=0).to(self._known_means.device)].to(self.device)
        if len(missing := (rows < 0).nonzero()[:, 0]):
            out[missing.to(self.device)] = self._read([lines[i] for i in missing.tolist()])
        return out


def _load(path: Path, key: str, rows: int) -> tuple[dict[str, Tensor], bool]:
    """The kept means and True; nothing and False where there is no such file, or one that is not whole."""
    try:
        tensors, facts = checkpoint.load(path)
    except UserError:
        return {}, False
    means = tensors.get("means")
    whole = means is not None and means.dtype == torch.float32 and means.ndim == 2 and len(means) == rows
    return (tensors, True) if whole and facts.get("fingerprint") == key else ({}, False)


@torch.no_grad()
def _means(
    backbone: Backbone, lines: list[np.ndarray], progress: Callable[[int], None] | None, world: World
) -> Float[Tensor, "n_items d_means"]:
    """Mean outputs of each line's tokens; equal lines are read once. They go through the LLM in chunks of like length;
    the processes of `world` take the chunks in turn and exchange what they found, unless the LLM itself is shared out
    among them."""
    number: dict[bytes, int] = {}
    rows = np.array([number.setdefault(line.tobytes(), len(number)) for line in lines])
    _, firsts, counts = np.unique(rows, return_index=True, return_counts=True)
    out = torch.empty(len(number), backbone.d_means, device=backbone.device)
    order = np.argsort([len(lines[at]) for at in firsts], kind="stable")
    chunks = [order[at : at + _AT_ONCE] for at in range(0, len(order), _AT_ONCE)]
    alone = World() if backbone.sharded else world
    for mine in alone.share(len(chunks)):
        chunk = chunks[mine]
        out[move(torch.as_tensor(chunk), backbone.device)] = _chunk_means(backbone, [lines[i] for i in firsts[chunk]])
        if progress:
            progress(sum(int(counts[each].sum()) for each in chunks[mine : mine + alone.size]))
    for turn, chunk in enumerate(chunks if alone.size > 1 else []):
        at = move(torch.as_tensor(chunk), backbone.device)
        part = out[at]
        alone.follow([part], leader=turn % alone.size)
        out[at] = part
    return out if len(number) == len(lines) else out[move(torch.as_tensor(rows), backbone.device)]


def _chunk_means(backbone: Backbone, lines: list[np.ndarray]) -> Float[Tensor, "lines d_means"]:
    lengths, at_layers = [len(line) for line in lines], backbone.config.mean_layers
    tokens = backbone.tokens(np.concatenate(lines))
    rows = backbone.embed(tokens).split(lengths)
    read = backbone.decoder.read_layers(rows, at_layers) if at_layers else backbone.decoder.read_rows(rows, False)
    return torch.stack([x[min(1, len(x) - 1) :].float().mean(dim=0) for x in read.split(lengths)])


def _side_by_side(means: Float[Tensor, "n_items d_means"], depths: int, own: Float[Tensor, "n_items d_own"]
                  ) -> Float[Tensor, "n_items d_all"]:
    """All parts padded with zeros to the width of the widest."""
    parts = [*means.chunk(depths, dim=1), own]
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts], dim=1)


def text_whitening(
    outputs: Float[Tensor, "rows d_means"], layers: int
) -> tuple[Float[Tensor, "d_means"], Float[Tensor, "d_means dims"]]:
    """Mean and matrix of `whitened`, fitted on these rows, for `laserrec.llm.whitening.whiten`."""
    return fit_whitening(outputs, min(_DIMS, outputs.shape[1] // layers), layers)


def whitened(
    outputs: Float[Tensor, "n_items d_means"], layers: int, by: int | None = None
) -> Float[Tensor, "n_items d_text"]:
    """Each of the `layers` that stand side by side centred and whitened with the mean and covariance of the first `by`
    rows (None: all), the directions of largest variance first; at most 512 wide."""
    return whiten(outputs, *text_whitening(outputs[:by], layers), layers)
