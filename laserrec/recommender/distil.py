"""Distil a fitted Laser into a model folder that answers without the LLM (laserrec.methods.laser.distil)."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from laserrec.config import StudentConfig
from laserrec.data.dataset import Dataset
from laserrec.evaluation.evaluate import evaluate
from laserrec.methods.laser.build import compose
from laserrec.methods.laser.distil import DistilTask, distil_phase
from laserrec.methods.laser.model import Laser
from laserrec.methods.laser.sides import MeanItems
from laserrec.recommender import folder as folders
from laserrec.recommender.fitting import Fitted, open_folder, weights_of
from laserrec.recommender.recommender import LaserRecommender
from laserrec.recommender.scorers import FirstItems
from laserrec.recommender.validated import trained_on_validation
from laserrec.training.trainer import Pace, Trainer
from laserrec.util.distributed import alone
from laserrec.util.errors import UserError
from laserrec.util.io import locked, recover
from laserrec.util.progress import Progress


def distil(teacher: LaserRecommender, dataset: Dataset, folder: Path | str, config: StudentConfig | None = None,
           progress: bool = True) -> LaserRecommender:
    """Train a student on a data folder's training sequences, into a model folder of its own. A finished folder of the
    same teacher and settings is loaded; an unfinished one is resumed.

    `facts["student"]` tells what it took and, under "validation", what both score there; `facts["training"]` is of the
    student, with the teacher's under "teacher". Raises UserError for data of another catalogue, a teacher that is
    distilled itself or no Laser, or a folder of other settings or another teacher.
    """
    alone("distilling")
    config, folder = config or StudentConfig(), Path(folder)
    _check(teacher, dataset)
    fingerprint = _fingerprint(teacher, dataset, config)
    with locked(folder, "distil"):
        recover(folder)
        folders.check_free(folder)
        if not (folder / "model.json").is_file():
            _distil(teacher, dataset, folder, config, fingerprint, progress)
    if folders.read_note(folder).get("fingerprint") != fingerprint:
        raise UserError(f"{folder} holds another model, or one distilled with other settings; name another folder or "
                        "delete it")
    return LaserRecommender(open_folder(folder, teacher.model.device, features=teacher.fitted.features))


def _check(teacher: LaserRecommender, dataset: Dataset) -> None:
    if not isinstance(teacher.model, Laser) or teacher.model.reader is None:
        raise UserError("only a Laser that reads histories with the LLM can be distilled, and this one does not")
    if teacher.items["item_id"].head(teacher.n_known).to_list() != dataset.items["item_id"].to_list():
        raise UserError("the model was fitted on another catalogue than the data folder's; distil it on its own data")


def _distil(teacher: LaserRecommender, dataset: Dataset, folder: Path, config: StudentConfig, fingerprint: str,
            progress: bool) -> None:
    task = DistilTask(teacher.model, _student(teacher, config), dataset, progress)
    pace = Pace(config.seed, teacher.config.eval.k, teacher.batch_size, progress=progress)
    trainer = Trainer([distil_phase(task)], dataset, folder, fingerprint, pace, device=teacher.model.device)
    log = trainer.run()
    student = task.student.eval().requires_grad_(False)
    note: dict[str, Any] = {"config": config.model_dump(mode="json"), "histories": len(task.histories),
                            "seconds": trainer.summary()["seconds"], "validation": {}}
    facts = {name: teacher.facts[name] for name in ("data", "card") if name in teacher.facts}
    training = {**trainer.summary(), "kept": {}, "teacher": teacher.facts.get("training", {})}
    removed = {"removed": sorted(teacher.removed)} if teacher.removed else {}
    fitted = Fitted(student, "laser", student.config, teacher.items, teacher.n_known, teacher.fitted.features,
                    {**facts, **removed, "fingerprint": fingerprint, "training": training, "student": note},
                    teacher.fitted.id_model, teacher.fitted.backbone, log)
    model = LaserRecommender(fitted)
    for name, side in (("teacher", teacher), ("student", model)) if len(dataset.cases("validation")) else ():
        with Progress(f"validating the {name}", len(dataset.cases("validation")), progress) as bar:
            result = evaluate(name, FirstItems(side, dataset.n_items), dataset, "validation", teacher.config.eval.k,
                              teacher.batch_size, bar.advance)
        note["validation"][name] = {**result.plain.as_dict(), "seconds": round(result.seconds, 2)}
        if side is model:
            model.record(result, dataset)
            if not trained_on_validation(training):
                training["kept"] = {f"validation_{metric}": value for metric, value in result.plain.as_dict().items()}
    folders.save(folder, model.saved(), finished=True)


def _student(teacher: LaserRecommender, config: StudentConfig) -> Laser:
    """The teacher's items and terms with a fresh network in the place of the reader."""
    own, model = teacher.config.model_copy(update={"student": config}), teacher.model
    means = model.item_side.means if isinstance(model.item_side, MeanItems) else None
    torch.manual_seed(config.seed)
    student = compose(own, teacher.items, teacher.n_known, teacher.fitted.features, model.ids.model, means)
    if model.ranker is not None:
        student.ranker = deepcopy(model.ranker)
    shared = {n: t for n, t in model.state_dict().items() if n in student.state_dict()}
    student.load_state_dict({**student.state_dict(), **shared})
    student.set_items(model.vectors)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith("student."))
    return student


def _fingerprint(teacher: LaserRecommender, dataset: Dataset, config: StudentConfig) -> str:
    """Of all that a student is made of."""
    digest = hashlib.sha256(f"{dataset.fingerprint} {config.model_dump_json()}".encode())
    digest.update(teacher.config.model_dump_json().encode())
    digest.update(json.dumps(sorted(teacher.removed)).encode() if teacher.removed else b"")
    below = {f"id.{k}": v for k, v in teacher.model.ids.model.state_dict().items()} if teacher.model.ids.model else {}
    for name, tensor in sorted({**weights_of(teacher.fitted), **below}.items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
