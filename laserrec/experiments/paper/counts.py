"""Tables 1 and 3 of the paper: statistics of the data, and how many parameters each way of tuning an LLM trains.

Nothing is trained. Models of the paper's sizes are built on the meta device, without weights.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import polars as pl
import torch

from laserrec.config import Config, load_config
from laserrec.data.dataset import Dataset
from laserrec.methods.laser.mformer import MFormer
from laserrec.util.errors import UserError

PUBLISHED_DATA = {
    "Scientific": (11_041, 5_327, 76_896, 6.96), "Arts": (56_210, 22_855, 492_492, 8.76),
    "Pet": (47_569, 37_970, 420_662, 8.84)}
"""Users, items, interactions, mean history (Table 1), of the RECFORMER split, which is not public."""
PUBLISHED_PARAMETERS = {("GPT2-Large", "LLM4REC: all weights"): 787_300_000,
                        ("Llama2-7B", "LlamaRec: QLoRA"): 4_194_000,
                        ("ChatGLM2-6B", "Laser: Bi-Tuning"): 135_000}
"""Table 3: language model, what is trained in it -> parameters."""
_LORA_RANK = 8
"""LlamaRec's, on query and value projections."""
_PREFIX = 32


def table1(data: Mapping[str, Path]) -> list[dict[str, Any]]:
    """{data, users, items, interactions, mean_history, density} of data folders, and the paper's own rows."""
    rows = []
    for name, folder in data.items():
        dataset = Dataset.load(folder)
        per_user = dataset.interactions.group_by("user").agg(pl.len())["len"]
        rows.append(_statistics(name, dataset.n_users, dataset.n_items, dataset.interactions.height,
                                float(per_user.cast(pl.Float64).mean() or 0.0), False))  # ty: ignore
    return rows + [_statistics(name, *facts, True) for name, facts in PUBLISHED_DATA.items()]


def _statistics(name: str, users: int, items: int, interactions: int, mean: float, published: bool) -> dict[str, Any]:
    return {"data": name, "users": users, "items": items, "interactions": interactions,
            "mean_history": round(mean, 2), "density": interactions / (users * items), "published": published}


def table3() -> list[dict[str, Any]]:
    """{llm, tuning, trained, llm_parameters, share_percent, published} for the paper's LLMs and for ours: full tuning,
    LoRA, prefix tuning (keys and values of every layer), and Bi-Tuning as the paper counts it (the tokens that the LLM
    reads) and as a whole (all that Laser trains). Then the paper's own rows, in which the LLM's size and the share are
    None. Raises UserError without the extra `rivals`."""
    check_peft()
    rows = []
    for name, make, config in _models():
        llm = _on_meta(make)
        total = _count(llm)
        rows.append(_row(name, "full", total, total))
        rows.append(_row(name, f"LoRA, rank {_LORA_RANK}, query and value", _adapted(make, "lora"), total))
        rows.append(_row(name, f"prefix tuning, {_PREFIX} tokens in every layer", _adapted(make, "prefix"), total))
        tokens, whole = _bi_tuning(config, llm.config.hidden_size)
        rows.append(_row(name, "Bi-Tuning: prefix and suffix as the LLM reads them", tokens, total))
        rows.append(_row(name, "Bi-Tuning: all that is trained (M-Former, router, suffix)", whole, total))
    return rows + [{"llm": llm, "tuning": tuning, "trained": trained, "llm_parameters": None, "share_percent": None,
                    "published": True} for (llm, tuning), trained in PUBLISHED_PARAMETERS.items()]


def check_peft() -> None:
    """Raises UserError without the extra `rivals`, which Table 3 needs."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft loads it; what it warns of isn't used here
    try:
        import_module("peft")
    except ImportError:
        raise UserError("counting LoRA and prefix tuning needs peft: pip install 'laserrec[rivals]'") from None


def _row(llm: str, tuning: str, trained: int, total: int) -> dict[str, Any]:
    return {"llm": llm, "tuning": tuning, "trained": trained, "llm_parameters": total,
            "share_percent": round(100 * trained / total, 4), "published": False}


def _models() -> list[tuple[str, Callable[[], Any], Config]]:
    """Of the paper's sizes, and the one that is used here. ChatGLM2-6B's code is its owner's and not in transformers; a
    Llama of the same width and depth stands for it, which has the same tokens to tune."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    llama7 = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         vocab_size=32000)
    glm6 = LlamaConfig(hidden_size=4096, intermediate_size=13696, num_hidden_layers=28, num_attention_heads=32,
                       num_key_value_heads=2, vocab_size=65024)
    small = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
                        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True)
    gpt2 = GPT2Config(n_embd=1280, n_layer=36, n_head=20)
    paper = load_config("paper")
    return [("GPT2-Large", lambda: GPT2LMHeadModel(gpt2), paper),
            ("Llama2-7B", lambda: LlamaForCausalLM(llama7), paper),
            ("ChatGLM2-6B (sizes)", lambda: LlamaForCausalLM(glm6), paper),
            ("SmolLM2-135M", lambda: LlamaForCausalLM(small), load_config("paper-small"))]


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def _count(model: torch.nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def _adapted(make: Callable[[], Any], how: str) -> int:
    """Trained parameters as peft counts them."""
    from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model

    llm = _on_meta(make)
    fused = llm.config.model_type == "gpt2"  # one matrix for query, key and value
    kind: Any = LoraConfig(r=_LORA_RANK, lora_alpha=32, target_modules=["c_attn"] if fused else ["q_proj", "v_proj"],
                           fan_in_fan_out=fused)
    if how == "prefix":
        kind = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=_PREFIX)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between peft and transformers
        return _count(get_peft_model(llm, kind), trained_only=True)


def _bi_tuning(config: Config, d_llm: int) -> tuple[int, int]:
    with torch.device("meta"):
        mformer = MFormer(config.mformer, config.id_model.d_id, d_llm, 0.02)
    return (config.mformer.queries + 1) * d_llm, _count(mformer) + d_llm
