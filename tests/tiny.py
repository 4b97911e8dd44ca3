"""Small things the tests build on: random decoders of each family, a planted catalogue, settings of a few neurons."""

from pathlib import Path

import numpy as np
import polars as pl
import torch

from laserrec.config import Config, IdModelConfig
from laserrec.data.dataset import Dataset
from laserrec.data.histories import Histories
from laserrec.llm.text_features import TextFeatures
from laserrec.methods.laser.build import compose, phases
from laserrec.methods.laser.model import Laser
from laserrec.methods.sasrec import SASRec
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.device import CPU
from laserrec.util.distributed import World

NATIVE = ("llama", "mistral", "qwen2", "qwen3")
WORDS = ("red", "blue", "saw", "hammer", "drill", "paint", "glue", "nail", "wood", "steel")
ID_MODEL = IdModelConfig(d_id=16, blocks=1, heads=2, dropout=0.2, max_history=6)
_RIVAL = {"d_model": 16, "blocks": 1, "d_inner": 16, "dropout": 0.2, "max_history": 6, "max_epochs": 2, "lr": 1e-2,
          "batch_size": 16}
RIVALS = {
    "lrurec": {"d_id": 16, "blocks": 1, "dropout": 0.2, "max_history": 6, "max_epochs": 2, "lr": 1e-2, "batch_size": 16,
               "eval_every": 1},
    "llamarec": {"candidates": 4, "max_history": 3, "title_tokens": 4, "lora_rank": 2, "lora_dropout": 0.1, "lr": 1e-2,
                 "epoch_examples": 40, "batch_size": 8},
    "recformer": {"d_model": 16, "blocks": 1, "heads": 2, "dropout": 0.1, "window": 8, "max_items": 3, "max_tokens": 32,
                  "attribute_tokens": 4, "lr": 1e-2, "batch_size": 8, "max_epochs": 2, "stage_two_epochs": 1,
                  "eval_every": 1},
    "llm4rec": {"max_history": 6, "max_epochs": 2, "lr": 1e-3, "batch_size": 16},
    "fdsa": _RIVAL, "zesrec": _RIVAL, "kar": {**_RIVAL, "own_experts": 2, "d_expert": 8},
    "recguru": {**_RIVAL, "autoencoder_epochs": 1, "negatives": 4},
}
"""Settings of a few neurons for the rivals that have a section of their own."""


def tokenizer():
    """Byte-level BPE over a few lines: reads any text, 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    lines = ["You are an intelligent recommendation assistant. In chronological order, the user has browsed items:",
             *(f"{a} {b} (brand: {a}co, category: {b}s)" for a in WORDS for b in WORDS)]
    core.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


def make_llm(family: str, seed: int = 0, **other_sizes: int):
    """A random decoder; norms, biases and weights are far from their initial values, so that each one matters."""
    import transformers as t

    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024} | other_sizes
    config = {
        "llama": lambda: t.LlamaConfig(**sizes),
        "mistral": lambda: t.MistralConfig(**sizes, sliding_window=None),
        "qwen2": lambda: t.Qwen2Config(**sizes),
        "qwen3": lambda: t.Qwen3Config(**sizes, head_dim=16),
        "gpt2": lambda: t.GPT2Config(vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=512),
    }[family]()
    torch.manual_seed(seed)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(mean=1.0 if "norm" in name or "ln_" in name else 0.0, std=0.3)
    return model


def save_llm(folder: Path, family: str, seed: int = 0, **sizes: int) -> Path:
    make_llm(family, seed, **sizes).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def config(folder: Path | str, **sections: dict) -> Config:
    """Settings of a few neurons; `sections` as in Config, merged over them."""
    base = {
        "backbone": {"name": str(folder), "precision": "fp32"},
        "id_model": ID_MODEL.model_dump() | {"max_epochs": 3, "lr": 1e-2, "batch_size": 16},
        "prompt": {"max_items": 4, "max_item_tokens": 8},
        "mformer": {"experts": 3, "queries": 2, "blocks": 2, "d_model": 16, "heads": 2},
        "train": {"lr": 1e-2, "batch_size": 16, "stage_one_epochs": 2, "stage_two_epochs": 1},
        "eval": {"batch_size": 16}, **RIVALS,
    }
    return Config.model_validate({name: base.get(name, {}) | sections.get(name, {}) for name in {*base, *sections}})


def items(n: int) -> pl.DataFrame:
    """Titles of unequal length, so that batches are padded."""
    titles = [" ".join(WORDS[(j * (p + 3)) % len(WORDS)] for p in range(1 + j % 4)) + f" {j}" for j in range(1, n + 1)]
    brands = pl.Series([f"{WORDS[j % 3]}co" if j % 2 else None for j in range(n)], dtype=pl.String)
    return pl.DataFrame({"item": pl.Series(range(n), dtype=pl.Int32),
                         "item_id": [f"i{j}" for j in range(1, n + 1)], "title": titles, "brand": brands,
                         "category": ["tools" if j % 3 else None for j in range(n)]})


def dataset(sequences: list[list[int]], n: int) -> Dataset:
    """Leave-one-out over the given sequences of item rows: user 0's, user 1's ..."""
    rows = []
    for user, sequence in enumerate(sequences):
        last = len(sequence) - 1
        rows += [(user, item, p, p, {last: "test", last - 1: "validation"}.get(p, "train"))
                 for p, item in enumerate(sequence)]
    schema = {"user": pl.Int32, "item": pl.Int32, "position": pl.Int32, "timestamp": pl.Int64, "split": pl.String}
    count = len(sequences)
    users = pl.DataFrame({"user": pl.Series(range(count), dtype=pl.Int32),
                          "user_id": [f"u{j}" for j in range(1, count + 1)]})
    return Dataset(items(n), users, pl.DataFrame(rows, schema=schema, orient="row"), {"sha256": f"planted {n} {count}"})


def planted(n: int = 20, users: int = 40, seed: int = 0) -> Dataset:
    """Users who walk up the catalogue: row i is always followed by i + 1 (after the last comes 0)."""
    rng = np.random.default_rng(seed)
    return dataset([[int(start + p) % n for p in range(length)]
                    for start, length in zip(rng.integers(0, n, users), rng.integers(5, 9, users), strict=True)], n)


def planted_tables(n: int, users: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`planted` as a caller's frames: interactions (user_id u1.., item_id i1.., timestamp) and items."""
    data = planted(n, users)
    rows = [(f"u{r['user'] + 1}", f"i{r['item'] + 1}", r["position"]) for r in data.interactions.to_dicts()]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row"), data.items.drop("item")


def id_model(n: int, seed: int = 1) -> SASRec:
    """Random and frozen."""
    torch.manual_seed(seed)
    model = SASRec(ID_MODEL, n)
    with torch.no_grad():  # an untrained SASRec's states are all alike
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval().requires_grad_(False)


def features(backbone, tree: Config | None = None) -> TextFeatures:
    """Of a loaded LLM."""
    return TextFeatures(backbone.config, (tree or config(backbone.name)).prompt, CPU, backbone=backbone)


def laser(backbone, n: int = 12, n_known: int | None = None, seed: int = 2, **sections: dict) -> Laser:
    """A fresh Laser with a random ID model over `n` items."""
    model = id_model(n_known or n)
    torch.manual_seed(seed)
    tree = config(backbone.name, **sections).model_copy(update={"backbone": backbone.config})
    return compose(tree, items(n), n_known or n, features(backbone, tree), model)


def histories(*rows: list[int]) -> Histories:
    """Of item rows."""
    return Histories.of(rows)


QUICK = {"template": "no_instruction", "max_items": 2, "max_item_tokens": 4}


def trainer(backbone, folder: Path, data: Dataset | None = None, below=None, world: World | None = None,
            fingerprint: str = "planted", **sections: dict) -> Trainer:
    """Both stages of a fresh Laser over short texts, as `fitting.fit` trains it."""
    data, world = data or planted(20, users=20), world or World()
    tree = config(backbone.name, **{**sections, "prompt": QUICK | sections.get("prompt", {})})
    tree = tree.model_copy(update={"backbone": backbone.config})
    torch.manual_seed(tree.train.seed)
    made = compose(tree, data.items, data.n_items, features(backbone, tree), below or id_model(data.n_items),
                   world=world)
    pace = Pace(tree.train.seed, eval_batch_size=tree.eval.batch_size, validation_users=tree.train.validation_users,
                checkpoint_minutes=tree.train.checkpoint_minutes, progress=False)
    return Trainer(phases(made, data, world), data, folder, fingerprint, pace, world)


def result(fit: Trainer) -> dict[str, torch.Tensor]:
    """What a training left: the kept epoch."""
    return dict(fit.best)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
