"""Load a frozen decoder LLM: the embedded default, a Hugging Face id, or a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor, nn

from laserrec.config import BackboneConfig, Engine, Precision, Quantization
from laserrec.llm.decoder import NativeDecoder, native_reason
from laserrec.llm.precision import resolve_precision
from laserrec.llm.shard import shard
from laserrec.llm.weights import find_weights, load_tokenizer, loading, source
from laserrec.util.device import CPU, move
from laserrec.util.distributed import World, join
from laserrec.util.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Backbone:
    """A frozen LLM. It is no nn.Module on purpose: nothing of it can get into an adapter's state_dict."""

    decoder: NativeDecoder | TransformersDecoder
    """embeds [batch seq d_llm] -> final outputs [batch seq d_llm]; pad on the right."""
    embedding: Float[Tensor, "vocabulary d_llm"]
    tokenizer: Any
    """transformers' own."""
    name: str
    revision: str | None
    """The commit, if the weights come from the hub."""
    sha256: str
    """Over the weight files."""
    config: BackboneConfig
    sharded: bool = False
    """Other processes hold parts of it: it computes in all of them or in none."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.embedding.device

    @property
    def d_llm(self) -> int:
        return self.embedding.shape[1]

    @property
    def d_means(self) -> int:
        """Width of an item text's mean outputs: d_llm for each depth."""
        return self.d_llm * max(1, len(self.config.mean_layers))

    @property
    def native(self) -> bool:
        return isinstance(self.decoder, NativeDecoder)

    def tokens(self, ids: ArrayLike) -> Int[Tensor, "*batch seq"]:
        """Token ids on the device."""
        return move(torch.as_tensor(ids, dtype=torch.long), self.device)

    def embed(self, tokens: Int[Tensor, "*batch seq"]) -> Float[Tensor, "*batch seq d_llm"]:
        """Token embeddings, without gradient."""
        return self.embedding[tokens]

    def tensor_hash(self) -> str:
        """sha256 over the weights in memory, to see that training left them alone."""
        digest = hashlib.sha256(self.embedding.detach().float().cpu().numpy().tobytes())
        tensors = {**dict(self.decoder.named_parameters()), **dict(self.decoder.named_buffers())}
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


class TransformersDecoder(nn.Module):
    """Any decoder of transformers behind the native decoder's interface."""

    def __init__(self, model: Any, layers: int | None, recompute: bool = False,
                 mean_layers: Sequence[int] = ()):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        if recompute:
            _recompute_layers(model)
        self._place, self._stack, self._layers = None, None, layers
        if layers is not None or mean_layers:
            self._place, self._stack = _layer_stack(model)
            self._stack = self._stack[: max(layers or len(self._stack), *mean_layers, 0)]
            self._cut(layers)
        self.dtype = next(model.parameters()).dtype

    def forward(self, embeds: Float[Tensor, "batch seq d_llm"]) -> Float[Tensor, "batch seq d_llm"]:
        """Causal pass; pad on the right. Outputs after the final norm, float32."""
        out = self.model(inputs_embeds=embeds.to(self.dtype), use_cache=False)
        return out.last_hidden_state.float()

    def read_rows(self, rows: Sequence[Float[Tensor, "_ d_llm"]], last_only: bool) -> Float[Tensor, "some d_llm"]:
        """As the native decoder's, padded on the right: a causal decoder's earlier outputs can't see what stands
        behind them, so an output doesn't depend on its batch."""
        outputs = self(nn.utils.rnn.pad_sequence(list(rows), batch_first=True))
        lengths = [len(row) for row in rows]
        if last_only:
            last = move(torch.tensor(lengths) - 1, outputs.device)
            return outputs[torch.arange(len(rows), device=outputs.device), last]
        return torch.cat([out[:n] for out, n in zip(outputs, lengths, strict=True)])

    def read_layers(self, rows: Sequence[Float[Tensor, "_ d_llm"]], at: Sequence[int]) -> Float[Tensor, "some d_all"]:
        """As the native decoder's, one pass per depth: what stands behind the last layer differs between families."""
        outputs = []
        for layers in at:
            self._cut(layers)
            outputs.append(self.read_rows(rows, last_only=False))
        self._cut(self._layers)
        return torch.cat(outputs, dim=-1)

    def _cut(self, layers: int | None) -> None:
        assert self._place is not None and self._stack is not None  # found where layers are cut
        setattr(*self._place, self._stack[:layers])


def _recompute_layers(model: Any) -> None:
    """Gradient checkpointing. transformers has it for training only; a layer's own flag (and none inside it, where
    dropout would wake up) makes it believe so."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _layer_stack(model: Any) -> tuple[tuple[nn.Module, str], nn.ModuleList]:
    wanted = getattr(model.config, "num_hidden_layers", None) or getattr(model.config, "num_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            parent, _, name = path.rpartition(".")
            return (model.get_submodule(parent), name), module
    raise UserError(f"backbone.layers, backbone.shard: {type(model).__name__} has no list of {wanted} layers to cut; "
                    "leave them unset")


def load_backbone(config: BackboneConfig, device: torch.device = CPU, trust_remote_code: bool = False) -> Backbone:
    """The LLM on `device`.

    trust_remote_code: run Python code that comes with the model (ChatGLM2 needs it), and read weights that are no
    safetensors; only for sources you trust. No setting and no folder can allow it, the caller alone.

    Raises UserError when the model is not there, is not a decoder, or can't use the engine asked for.
    """
    from transformers import AutoModel

    world = join() if config.shard else World()
    dtype = torch.bfloat16 if resolve_precision(config.precision, device) == Precision.BF16 else torch.float32
    quantized = _quantization_options(config, dtype, device)
    tokenizer = load_tokenizer(config, trust_remote_code)
    if world.size > 1:
        return _load_sharded(config, dtype, tokenizer, world, device, trust_remote_code)
    with loading(config):
        model, loaded = AutoModel.from_pretrained(
            source(config), revision=config.revision, dtype=dtype, output_loading_info=True,
            trust_remote_code=trust_remote_code, use_safetensors=None if trust_remote_code else True, **quantized)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"backbone {config.name!r} lacks {len(missing)} weights, first {missing[:3]}; fetch it again")
    model.requires_grad_(False).eval()
    _check_layers(model, config)
    decoder = _decoder(model, config, dtype)
    if not quantized:  # quantized weights are on the device already
        decoder.to(device)
    embedding = model.get_input_embeddings().weight.detach().to(device)
    weights = find_weights(config)
    return Backbone(decoder, embedding, tokenizer, config.name, weights.revision, weights.sha256, config)


def _check_layers(model: Any, config: BackboneConfig) -> None:
    there: int = model.config.num_hidden_layers
    if config.layers is not None and config.layers > there:
        raise UserError(f"backbone.layers is {config.layers}, but {config.name} has {there}; set at most {there}")
    if max(config.mean_layers, default=0) > there:
        raise UserError(f"backbone.mean_layers is {config.mean_layers}, but {config.name} has {there} layers; set "
                        f"backbone.mean_layers to some of 1 to {there}, or to [] for the last of backbone.layers alone")


def _load_sharded(config: BackboneConfig, dtype: torch.dtype, tokenizer: Any, world: World, device: torch.device,
                  trust_remote_code: bool) -> Backbone:
    from accelerate import init_empty_weights
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModel

    with loading(config), init_empty_weights(include_buffers=False):
        path = source(config)
        if not Path(path).is_dir():
            wanted = ["*.safetensors", "*.json", *(["*.py"] if trust_remote_code else [])]
            snapshot_download(path, revision=config.revision, allow_patterns=wanted)
        weights = find_weights(config)
        if weights.folder is None:
            raise UserError(f"backbone {config.name!r} has no config.json")
        settings = AutoConfig.from_pretrained(weights.folder, trust_remote_code=trust_remote_code)
        model = AutoModel.from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
    model.requires_grad_(False).eval()
    _check_layers(model, config)
    (parent, name), _ = _layer_stack(model)
    decoder = TransformersDecoder(model, config.layers, config.gradient_checkpointing)
    shard(model, getattr(parent, name), weights.folder, dtype, world, device)
    embedding = model.get_input_embeddings().weight.detach()
    return Backbone(decoder, embedding, tokenizer, config.name, weights.revision, weights.sha256, config, True)


def _quantization_options(config: BackboneConfig, dtype: torch.dtype, device: torch.device) -> dict[str, object]:
    if config.quantization == Quantization.NONE:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"backbone.quantization {config.quantization} needs bitsandbytes: "
                        "pip install 'laserrec[quant]'")
    from transformers import BitsAndBytesConfig

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # once a layer and pass otherwise
    if config.quantization == Quantization.INT8:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": settings, "device_map": {"": device}}


def _decoder(model: Any, config: BackboneConfig, dtype: torch.dtype) -> NativeDecoder | TransformersDecoder:
    reason = native_reason(model.config)
    if config.quantization != Quantization.NONE:
        reason = f"{config.quantization} weights"
    if config.engine == Engine.NATIVE and reason:
        raise UserError(f"backbone.engine = native can't run {config.name}: {reason}; use auto or transformers")
    if config.engine == Engine.TRANSFORMERS or reason:
        if reason:
            log.info("backbone %s runs on transformers' own forward: %s", config.name, reason)
        return TransformersDecoder(model, config.layers, config.gradient_checkpointing, config.mean_layers)
    return NativeDecoder(model, dtype, config.layers, config.compiled, config.gradient_checkpointing,
                         config.mean_layers)
