"""Load a frozen decoder LLM: the embedded default, a Hugging Face id, or a local folder."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from laserrec.config import BackboneConfig, Engine, Precision, Quantization
from laserrec.llm.decoder import NativeDecoder, native_reason
from laserrec.llm.fetch import DEFAULT_NAME, fetch_default
from laserrec.llm.shard import shard
from laserrec.util.distributed import World, join
from laserrec.util.errors import UserError

log = logging.getLogger(__name__)


@dataclass
class Backbone:
    """A frozen LLM. It is no nn.Module on purpose: nothing of it can get into an adapter's state_dict."""

    decoder: nn.Module
    """embeds [batch seq d_llm] -> final outputs [batch seq d_llm]; pad on the right."""
    embedding: Float[Tensor, "vocabulary d_llm"]
    tokenizer: object
    name: str
    revision: str | None
    """The commit, if the weights come from the hub."""
    sha256: str
    """Over the weight files."""
    config: BackboneConfig
    sharded: bool = False
    """Other processes hold parts of it: it computes in all of them or in none."""
    kept_means: dict[bytes, Tensor] = field(default_factory=dict, repr=False)
    """The last catalogue's mean outputs (laserrec.llm.text_features), by its texts."""

    @property
    def d_llm(self) -> int:
        return self.embedding.shape[1]

    @property
    def mean_depths(self) -> int:
        """Behind how many layers an item text's outputs are averaged."""
        return max(1, len(self.config.mean_layers))

    @property
    def d_means(self) -> int:
        """Width of an item text's mean outputs: d_llm for each depth."""
        return self.d_llm * self.mean_depths

    @property
    def native(self) -> bool:
        return isinstance(self.decoder, NativeDecoder)

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

    def __init__(self, model: nn.Module, layers: int | None, recompute: bool = False,
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
        lengths = torch.tensor([len(row) for row in rows])
        if last_only:
            return outputs[torch.arange(len(rows)), lengths - 1]
        return torch.cat([out[:n] for out, n in zip(outputs, lengths.tolist(), strict=True)])

    def read_layers(self, rows: Sequence[Float[Tensor, "_ d_llm"]], at: Sequence[int]) -> Float[Tensor, "some d_all"]:
        """As the native decoder's, one pass per depth: what stands behind the last layer differs between families."""
        outputs = []
        for layers in at:
            self._cut(layers)
            outputs.append(self.read_rows(rows, last_only=False))
        self._cut(self._layers)
        return torch.cat(outputs, dim=-1)

    def _cut(self, layers: int | None) -> None:
        setattr(*self._place, self._stack[:layers])


def _recompute_layers(model: nn.Module) -> None:
    """Gradient checkpointing. transformers has it for training only; a layer's own flag (and none inside it, where
    dropout would wake up) makes it believe so."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


def _layer_stack(model: nn.Module) -> tuple[tuple[nn.Module, str], nn.ModuleList]:
    wanted = getattr(model.config, "num_hidden_layers", None) or getattr(model.config, "num_layers", None)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            parent, _, name = path.rpartition(".")
            return (model.get_submodule(parent), name), module
    raise UserError(f"backbone.layers, backbone.shard: {type(model).__name__} has no list of {wanted} layers to cut; "
                    "leave them unset")


def load_backbone(config: BackboneConfig) -> Backbone:
    """Raises UserError when the model is not there, is not a decoder, or can't use the engine asked for."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as hf_logging

    path = str(fetch_default()) if config.name == DEFAULT_NAME else config.name
    world = join() if config.shard else World()
    dtype = torch.bfloat16 if resolve_precision(config.precision) == Precision.BF16 else torch.float32
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    quantized = _quantization_options(config, dtype)
    hf_logging.disable_progress_bar()
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # it reports the unused output layer; missing weights are checked below
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        if world.size > 1:
            return _load_sharded(path, config, dtype, tokenizer, world)
        model, loaded = AutoModel.from_pretrained(path, dtype=dtype, output_loading_info=True, **options, **quantized)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"backbone {config.name!r} could not be loaded: {first}. Give `{DEFAULT_NAME}`, a Hugging Face id that "
            "this machine can reach, or a folder with config.json, tokenizer and safetensors"
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"backbone {config.name!r} lacks {len(missing)} weights, first {missing[:3]}; fetch it again")
    model.requires_grad_(False).eval()
    _check_layers(model, config)
    embedding = model.get_input_embeddings().weight.detach()
    decoder = _decoder(model, config, dtype)
    folder, revision = _weights_folder(path, config.revision)
    return Backbone(decoder, embedding, tokenizer, config.name, revision, _files_sha256(folder), config)


def _check_layers(model: nn.Module, config: BackboneConfig) -> None:
    there = model.config.num_hidden_layers
    if config.layers is not None and config.layers > there:
        raise UserError(f"backbone.layers is {config.layers}, but {config.name} has {there}")
    if max(config.mean_layers, default=0) > there:
        raise UserError(f"backbone.mean_layers is {config.mean_layers}, but {config.name} has {there} layers; name "
                        f"others (--backbone.mean-layers {there}, repeated for more), or the last of backbone.layers "
                        "alone: --backbone.empty-mean-layers")


def _load_sharded(path: str, config: BackboneConfig, dtype: torch.dtype, tokenizer: object, world: World) -> Backbone:
    from accelerate import init_empty_weights
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig, AutoModel

    if Path(path).is_dir():
        folder, revision = Path(path), None
    else:
        wanted = ["*.safetensors", "*.json", "*.py"]
        folder = Path(snapshot_download(path, revision=config.revision, allow_patterns=wanted))
        revision = folder.name  # .../snapshots/COMMIT
    with init_empty_weights(include_buffers=False):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        model = AutoModel.from_config(settings, dtype=dtype, trust_remote_code=config.trust_remote_code)
    model.requires_grad_(False).eval()
    _check_layers(model, config)
    (parent, name), _ = _layer_stack(model)
    decoder = TransformersDecoder(model, config.layers, config.gradient_checkpointing)
    shard(model, getattr(parent, name), folder, dtype, world)
    embedding = model.get_input_embeddings().weight.detach()
    return Backbone(decoder, embedding, tokenizer, config.name, revision, _files_sha256(folder), config, True)


def _quantization_options(config: BackboneConfig, dtype: torch.dtype) -> dict[str, object]:
    if config.quantization == Quantization.NONE:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"backbone.quantization {config.quantization} needs bitsandbytes: "
                        "pip install 'laserrec[quant]'")
    from transformers import BitsAndBytesConfig

    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # once a layer and pass otherwise
    if config.quantization == Quantization.INT8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                                      bnb_4bit_compute_dtype=dtype)}


def _decoder(model: nn.Module, config: BackboneConfig, dtype: torch.dtype) -> nn.Module:
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


def _weights_folder(path: str, revision: str | None) -> tuple[Path | None, str | None]:
    """Where the weights lie, and the commit they are of if they come from the hub: a branch's name says nothing of
    tomorrow's weights."""
    if Path(path).is_dir():
        return Path(path), None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "config.json", revision=revision)
    if not isinstance(found, str):
        return None, revision
    folder = Path(found).parent
    return folder, folder.name  # .../snapshots/COMMIT/config.json


def _files_sha256(folder: Path | None) -> str:
    digest = hashlib.sha256()
    files = [] if folder is None else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin"))
    for file in files:
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest() if files else ""


def resolve_precision(precision: Precision) -> Precision:
    """auto -> the faster of bf16 and fp32 on this machine, measured once per process."""
    return _measured_precision() if precision == Precision.AUTO else precision


@cache
def _measured_precision() -> Precision:
    if torch.cuda.is_available():
        return Precision.BF16 if torch.cuda.is_bf16_supported() else Precision.FP32
    seconds = {p: _product_seconds(d) for p, d in
               ((Precision.BF16, torch.bfloat16), (Precision.FP32, torch.float32))}
    # 1.2: bf16 must pay for its rounding clearly, and a noisy tie should not flip between runs.
    chosen = Precision.BF16 if seconds[Precision.BF16] * 1.2 < seconds[Precision.FP32] else Precision.FP32
    log.info("precision probe: bf16 %.2f ms, fp32 %.2f ms -> %s",
             1e3 * seconds[Precision.BF16], 1e3 * seconds[Precision.FP32], chosen)
    return chosen


def _product_seconds(dtype: torch.dtype) -> float:
    """Fastest of several products of the default backbone's MLP size."""
    a, b = torch.ones(1024, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.nn.functional.linear(a, b)
        best = min(best, time.perf_counter() - start)
    return best
