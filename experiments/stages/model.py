"""model: a model's source to an ordinary safetensors folder with tokenizer and base.json.

A model that another study, or another block, has made from the same settings is taken over: its weights are hard
links, so that they take the room of one model. DVC keeps both folders as usual. Nothing is ever written through a
link, because DVC and `materialise` delete the old files before they write new ones.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import md5
from pathlib import Path

from experiments.model import settled
from experiments.model.weights import building, materialise
from experiments.stages import resolve
from experiments.study import lock, whole
from methods.errors import UserError
from methods.tools.files import need_room


def main(study, *, model: str) -> None:
    out = study.paths.model(model)
    if source := made_before(study, model):
        take_over(source, out)
        name = source.relative_to(study.paths.root)
        print(f"model {model!r}: taken over from {name}, which was made from the same settings", flush=True)
    else:
        make(study, model, out)


def make(study, model: str, out: Path) -> None:
    """Make the model anew in the folder `out`, which appears whole or not at all."""
    block = study.models[model]
    if block.settle is None:
        materialise(name=model, block=block, packages=study.packages, out_dir=out)
        return
    with folder_of(study, getattr(block.settle, "from")) as start, building(model, out) as (_, made):
        settled.write(made, folder=start, adapter=study.paths.adapter(model), stated=block.settle)


@contextmanager
def folder_of(study, model: str) -> Iterator[Path]:
    """A folder with the model: one that a study has made from the same settings, else one that is there for a time."""
    own = study.paths.model(model)
    if found := made_before(study, model, own=True):
        yield found
        return
    with whole.beside(own) as fresh:
        make(study, model, fresh / own.name)
        yield fresh / own.name


def made_before(study, model: str, *, own: bool = False) -> Path | None:
    """The folder of a `model` stage that, by its dvc.lock, ran with the same settings and files.

    own   whether the study's own folder counts

    A folder whose content is no longer what DVC recorded is passed over.
    """
    root = study.paths.root
    settings = md5(resolve.text(resolve.model(study, model)).encode()).hexdigest()
    for file in [root / "dvc.lock", *sorted((root / "experiments" / "studies").glob("*/dvc.lock"))]:
        stages = {}
        with suppress(UserError):  # the lock of another study that is damaged
            stages = lock.stages(file)
        for name, stage in stages.items():
            if name.startswith("model@") and [dep.get("md5") for dep in stage["deps"]] == [settings]:
                for out in stage["outs"]:
                    folder = root / out["path"]
                    if (
                        (own or folder != study.paths.model(model))
                        and folder.is_dir()
                        and lock.folder_md5(folder) == out.get("md5")
                    ):
                        return folder
    return None


def take_over(source: Path, out: Path) -> None:
    """Make the folder `out` of the files of `source`: the weights as hard links where the disk has them, else copies.

    `out` appears whole or not at all.
    """
    with whole.folder(out) as made:
        for file in sorted(source.iterdir()):
            if file.suffix == ".safetensors":
                try:
                    os.link(file.resolve(), made / file.name)
                    continue
                except OSError:  # another disk, or one without hard links
                    need_room(made, file.stat().st_size, f"a copy of {file}")
            shutil.copyfile(file, made / file.name)
