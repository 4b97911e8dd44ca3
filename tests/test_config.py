"""Preset, file, overrides: the later wins; what is unknown or impossible is named."""

import pytest
from pydantic import ValidationError

from laserrec.config import Config, StudentConfig, load_config, merge
from laserrec.presets import ID_MODELS, PRESETS, READING
from laserrec.util.errors import UserError


@pytest.fixture
def toml(tmp_path):
    def write(text: str):
        (tmp_path / "my.toml").write_text(text, encoding="utf-8")
        return tmp_path / "my.toml"

    return write


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_valid(preset):
    config = load_config(preset)
    for section, values in PRESETS[preset].items():
        for name, value in values.items():
            assert getattr(getattr(config, section), name) == value


def test_later_ones_win(toml):
    preset = load_config("small")
    file = toml("[train]\nlr = 0.5\nbatch_size = 3\n")
    config = load_config("small", file, {"train": {"lr": 0.25}})
    assert (config.train.lr, config.train.batch_size) == (0.25, 3)
    assert config.train.stage_one_epochs == preset.train.stage_one_epochs != Config().train.stage_one_epochs
    assert load_config("small", file).train.lr == 0.5
    assert load_config("small") == preset


def test_the_papers_values_are_the_defaults():
    """Appendix B and section 3; what departs from the paper is off."""
    c = Config()
    assert (c.mformer.experts, c.mformer.queries, c.mformer.blocks, c.mformer.d_model) == (8, 32, 12, 768)
    assert (c.mformer.routing, c.mformer.zero_init, c.mformer.state_dropout) == ("hard", False, 0.0)
    assert (c.prompt.layout, c.prompt.template, c.prompt.item_side) == ("prefix_first", "paper", "trained")
    assert (c.head.pooling, c.head.whiten_dims, c.head.projection, c.head.id_share) == ("suffix", 0, False, 0.0)
    assert (c.train.stage_one_epochs, c.train.stage_two_epochs, c.train.batch_size, c.train.lr) == (15, 5, 4, 1e-4)
    assert not c.train.item_gradient and c.train.cuts == "all" and c.backbone.layers is None


@pytest.mark.parametrize(("text", "message"), [
    ("[train]\nlearning_rate = 1", r"train\.learning_rate: Extra inputs"),
    ("[trian]\nlr = 1", r"trian: Extra inputs"),
    ("[train]\nlr = -1", r"train\.lr: .*greater than 0 \(given: -1\)"),
    ("[train]\nlr = 'fast'", r"train\.lr: .*number"),
    ("[mformer]\nrouting = 'soft'", r"mformer\.routing: .*'hard' or 'gate_scaled'"),
    ("[mformer]\nd_model = 10\nheads = 4", "d_model 10 is not a multiple of heads 4"),
    ("[id_model]\nd_id = 9\nheads = 2", "d_id 9 is not a multiple of heads 2"),
    ("[id_model]\nkind = 'bert4rec'\nloss = 'bce'", "loss 'bce' is for kind 'sasrec'"),
    ("[prompt]\nlayout = 'text_first'\ntemplate = 'item_instruction'", "item_instruction needs layout prefix_first"),
    ("[prompt]\nlayout = 'text_first'\n[head]\npooling = 'mean'", r"mean needs prompt\.layout prefix_first"),
    ("train = 3", r"train: .*3"),
    ("[train", "is not valid TOML"),
])
def test_mistakes_in_a_file_are_named(toml, text, message):
    file = toml(text)
    with pytest.raises(UserError, match=message) as caught:
        load_config("small", file)
    assert "my.toml" in str(caught.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path):
    with pytest.raises(UserError, match="no such config file"):
        load_config("small", tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid TOML"):
        load_config("small", tmp_path / "binary.toml")


def test_unknown_preset():
    with pytest.raises(UserError, match="unknown preset 'huge'; there are: small"):
        load_config("huge")


def test_merge_changes_neither():
    base, over = {"a": {"x": 1, "y": 2}, "b": 1}, {"a": {"y": 3}, "c": 4}
    assert merge(base, over) == {"a": {"x": 1, "y": 3}, "b": 1, "c": 4}
    assert base == {"a": {"x": 1, "y": 2}, "b": 1} and over == {"a": {"y": 3}, "c": 4}


def test_a_config_is_frozen_and_survives_json():
    config = load_config("small")
    with pytest.raises(ValidationError):
        config.train.lr = 2.0
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_every_setting_is_documented():
    sections = [info.annotation for name, info in Config.model_fields.items() if name != "student"]
    for section in (*sections, StudentConfig):
        for name, field in section.model_fields.items():
            assert field.description, name


def test_a_method_fitted_alone_has_its_own_best_settings(tmp_path):
    """Below file and overrides, and without effect where the preset is made for it."""
    assert load_config(method="ease").neighbours.l2 == 400
    (tmp_path / "own.toml").write_text("[neighbours]\nl2 = 7")
    assert load_config("small", tmp_path / "own.toml", method="ease").neighbours.l2 == 7
    assert load_config(method="sasrec") == load_config("small", None, {"id_model": {"items": "ids"}})
    assert load_config("paper", method="bert4rec") == load_config("paper")
    for method, preset in (("bert4rec", "small"), ("sasrec", "paper")):
        tuned = load_config(preset, method=method).id_model
        own = load_config({"small": "paper", "paper": "small"}[preset]).id_model
        names = {*ID_MODELS["sasrec"], *ID_MODELS["bert4rec"]} - {"mask_probability"}  # bert4rec's alone
        assert tuned.model_dump(include=names) == own.model_dump(include=names)


@pytest.mark.parametrize("text", ["x = " + "1" * 5_000, "x = " + "[" * 20_000, "[train]\nlr = '" + "x" * 70_000 + "'",
                                  "\n".join(f"x{j} = 1" for j in range(3_000))])
def test_endless_toml_is_refused_briefly(tmp_path, text):
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as told:
        load_config("small", tmp_path / "x.toml")
    assert len(str(told.value)) < 3_000


def test_a_config_that_is_a_folder(tmp_path):
    with pytest.raises(UserError, match="can't be read"):
        load_config("small", tmp_path)


def test_bi_tuning_differs_from_small_in_how_histories_are_read_alone():
    small, reading = (load_config(name).model_dump(mode="json") for name in ("small", "bi-tuning"))
    differs = {(section, name) for section, values in small.items() if isinstance(values, dict)
               for name, value in values.items() if reading[section][name] != value}
    assert differs == {(section, name) for section, values in READING.items() for name in values}
    assert reading["prompt"]["layout"] == "text_first" and small["transformer"]["blocks"] == 2


@pytest.mark.parametrize("method", ["sasrec", "bert4rec", "gru4rec"])
def test_an_id_model_alone_knows_ids_alone(method):
    """Below Laser its item table starts from the LLM's embeddings; as a rival it is the published one."""
    assert load_config("small").id_model.items == "llm_start"
    assert load_config("small", method=method).id_model.items == "ids"
    assert load_config("small", None, {"id_model": {"items": "text"}}, method).id_model.items == "text"
