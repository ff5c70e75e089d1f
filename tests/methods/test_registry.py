"""Parts by name: composing, refusing by name, what a phase depends on, and parts of other packages."""

import ast
import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from methods import registry
from methods.__main__ import main
from methods.errors import UserError
from methods.ewc import EWC
from methods.hierarchical import Hierarchical
from methods.lora import LoRA
from methods.mofo import MomentumFilter
from methods.part import REGISTERED, Part, register, setting

ROOT = Path(registry.__file__).parent.parent


def test_the_built_in_parts_are_there():
    assert {"ewc", "given", "hierarchical", "lora", "mofo"} <= registry.parts().keys()
    for key, part in registry.parts().items():
        assert (
            part.key == key
            and part.title
            and part.line.endswith(".")
            and (part.paper.startswith("https://") or key == "given")
        )
        assert all(f.metadata["help"] for f in dataclasses.fields(part))


def test_a_block_becomes_parts_in_the_order_of_their_phases():
    block = {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj"]}, "ewc": None}
    assert (
        registry.build(block)
        == registry.build(dict(reversed(block.items())))
        == (LoRA(rank=4, alpha=8.0, targets=("q_proj",)), EWC())
    )
    assert registry.build({}) == registry.build(None) == ()
    assert isinstance(registry.build(block)[0].alpha, float)


@pytest.mark.parametrize(
    "block, message",
    [
        ({"mofoo": {}}, "unknown part 'mofoo': did you mean 'mofo'"),
        ({"dropout": {}}, "unknown part 'dropout': known: .*ewc, .*given, .*mofo"),
        ({"ewc": {"strenght": 1.0}}, "unknown setting 'strenght' in ewc: did you mean 'strength'"),
        ({"ewc": {"density": 0.2}}, "ewc.density no longer exists: importance is stored for every entry; leave it out"),
        (
            {"hierarchical": {"preset": "official"}},
            "hierarchical.preset no longer exists: write `like: hierarchical-paper` or `like: hierarchical-official`",
        ),
        ({"hierarchical": {"density": 1.0}}, "hierarchical.density no longer exists"),
        ({"ewc": 5}, "ewc is 5: it must be a mapping or null"),
        ({"mofo": {"fraction": 0}}, r"mofo.fraction is 0: it must be a number in \(0, 1\]"),
        ({"mofo": {"fraction": 1.5}}, r"mofo.fraction is 1.5: it must be a number in \(0, 1\]"),
        ({"mofo": {"fraction": float("nan")}}, r"mofo.fraction is nan: it must be a number in \(0, 1\]"),
        ({"mofo": {"fraction": True}}, r"mofo.fraction is true: it must be a number"),
        ({"mofo": {"decay_all": 1}}, "mofo.decay_all is 1: it must be true or false"),
        ({"ewc": {"strength": -1}}, r"ewc.strength is -1: it must be a number from 0"),
        (
            {"ewc": {"strength": "1e4"}},
            r"ewc.strength is '1e4': it must be a number from 0; write 10000.0 without quotes",
        ),
        ({"ewc": {"strength": None}}, "ewc.strength is null: it must be a number"),
        ({"ewc": {"strength": float("inf")}}, "ewc.strength is inf: it must be a number"),
        ({"ewc": {"samples": 0}}, r"ewc.samples is 0: it must be a whole number from 1"),
        ({"ewc": {"samples": 2.5}}, "ewc.samples is 2.5: it must be a whole number"),
        (
            {"ewc": {"estimator": "exact"}},
            "ewc.estimator is 'exact': it must be one of empirical, sampled, signed, batched",
        ),
        ({"lora": {"targets": "q_proj"}}, "lora.targets is 'q_proj': it must be a list of names"),
        ({"lora": {"targets": ["q_proj", 3]}}, "lora.targets is .*: it must be a list of names"),
        ({"lora": {"dropout": 1.0}}, r"lora.dropout is 1.0: it must be a number in \[0, 1\)"),
        ({"given": {}}, "given.path is missing"),
        ({"given": {"path": "x"}, "lora": {}}, "given and lora cannot be combined: given weights are not trained"),
    ],
)
def test_what_is_wrong_is_named(block, message):
    with pytest.raises(UserError, match=message):
        registry.build(block)


def test_a_phase_depends_on_its_settings():
    ewc = EWC(strength=5.0, samples=3)
    assert registry.phase_settings(ewc, "prepare") == {
        "samples": 3,
        "length": 512,
        "estimator": "empirical",
        "scope": "adapted",
        "bits": 8,
        "batch_size": 8,
        "earlier": "",
        "gamma": 1.0,
    }
    assert (
        registry.phase_settings(ewc, None)
        == registry.phase_settings(ewc, "train")
        == {"strength": 5.0, **registry.phase_settings(ewc, "prepare")}
    )
    assert registry.phase_settings(LoRA(), "prepare")["targets"] == ["q_proj", "v_proj"]
    # settings that change no preparation share it
    same = [Hierarchical(), Hierarchical(strength=9.0), Hierarchical(groups="blocks"), Hierarchical(layer_wise=False)]
    assert len({json.dumps(registry.phase_settings(h, "prepare")) for h in same}) == 1
    assert registry.phase_settings(Hierarchical(clamp="step"), "prepare")["clamp"] == "step"
    assert registry.phase_settings(MomentumFilter(), "prepare") == {}


# what the engine uses as well: a change beyond rounding in it raises NUMERICS, which is in every resolved file
OF_THE_ENGINE = {
    "part.py",
    "errors.py",
    "adam.py",
    "architecture.py",
    "costs.py",
    "files.py",
    "model_folder.py",
    "process_group.py",
    "resume.py",
}


def test_source_files_are_the_parts_own_and_what_it_shares():
    names = [path.name for path in registry.source_files(EWC)]
    assert names == ["ewc.py", "effective.py", "fisher.py", "importance.py", "per_example.py", "stored.py"]
    assert [p.name for p in registry.source_files(MomentumFilter())] == ["mofo.py", "selection.py"]
    for part in registry.parts().values():
        files = registry.source_files(part)
        assert all(path.is_file() for path in files)
        for path in files:  # an import of another module with code of a method is a declared one
            used = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("methods"):
                    modules = [a.name for a in node.names] if node.module == "methods.tools" else [node.module]
                    used |= {module.rpartition(".")[2] + ".py" for module in modules}
            assert used <= {p.name for p in files} | OF_THE_ENGINE, path


def test_a_part_is_declared_properly_or_refused():
    with pytest.raises(TypeError, match="would hide the hook"):

        @register(title="x", paper="", line="x.", key="wrong")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Hides(Part):
            batch: int = setting(1)

    with pytest.raises(TypeError, match="'befor_clip': did you mean 'before_clip'"):

        @register(title="x", paper="", line="x.", key="wrong")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Misspelt(Part):
            def befor_clip(self, **_):
                """A hook of another name would never be called."""

    with pytest.raises(TypeError, match=r"a setting as `setting\(\.\.\.\)` .*'rate'"):

        @register(title="x", paper="", line="x.", key="wrong")
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Undeclared(Part):
            rate: float = 1.0

    with pytest.raises(TypeError, match="frozen=True"):

        @register(title="x", paper="", line="x.", key="wrong")
        class Bare(Part):
            pass

    with pytest.raises(TypeError, match="unknown capability"):

        @register(title="x", paper="", line="x.", key="wrong", capabilities=frozenset({"flies"}))
        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Flies(Part):
            pass

    for key in ("ewc", "train"):
        with pytest.raises(UserError, match=f"part '{key}' of .*: the name is taken"):

            @register(title="x", paper="", line="x.", key=key)
            @dataclasses.dataclass(frozen=True, kw_only=True)
            class Taken(Part):
                pass

    assert "wrong" not in REGISTERED and REGISTERED["ewc"] is EWC


@pytest.fixture
def package(tmp_path, monkeypatch):
    """package(name, code, entry points): an installed distribution on the search path, gone after the test."""
    before = set(REGISTERED)

    def install(name, code, points):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            "[holdfast.parts]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()) + "\n"
        )
        if str(tmp_path) not in sys.path:
            monkeypatch.syspath_prepend(str(tmp_path))

    yield install
    for key in set(REGISTERED) - before:
        del REGISTERED[key]
    for path in tmp_path.glob("*.py"):
        sys.modules.pop(path.stem, None)


L2SP = """
    from dataclasses import dataclass
    from methods.tools.effective import effective_weights
    from methods.part import Part, register, setting

    @register(title="L2-SP", paper="https://arxiv.org/abs/1802.01483", line="Pull every weight back to the base.")
    @dataclass(frozen=True, kw_only=True)
    class L2SP(Part):
        strength: float = setting(1e-2, within="[0, inf)", help="α of α/2·‖θ−θ₀‖²")

        def before_clip(self, *, run, state, step):
            value = 0.0
            for weight in effective_weights(run):
                moved = weight.value()
                weight.pull(moved, scale=self.strength)
                value += self.strength / 2 * moved.square().sum()
            return value
"""


@pytest.mark.parametrize("adapter", [{}, {"lora": {"rank": 2}}])
def test_a_strangers_part_is_found_listed_and_trains(package, make, documents, train, adapter):
    package("stranger_l2sp", L2SP, {"stranger_l2sp": "stranger_l2sp:L2SP"})
    assert "L2SP" in str(registry.parts()["stranger_l2sp"])
    distances = []
    for strength in (0.0, 100.0):
        parts = registry.build({"stranger_l2sp": {"strength": strength}} | adapter)
        result = train(make(), parts, documents, epochs=4, learning_rate=1e-3)
        moved = {n: w.detach() - result.run.base.get(n, 0) for n, w in result.run.weights.items() if "lora_A" not in n}
        distances.append(torch.stack([m.norm() for m in moved.values()]).norm().item())
    assert distances[1] < 0.6 * distances[0]
    with pytest.raises(UserError, match="stranger_l2sp.strength is -1"):
        registry.build({"stranger_l2sp": {"strength": -1}})


def test_two_optimizers_are_refused_by_name(package):
    package(
        "stranger_sgd",
        """
        from dataclasses import dataclass
        from methods.part import Part, register

        @register(title="SGD", paper="", line="Plain descent.", capabilities=frozenset({"optimizer"}))
        @dataclass(frozen=True, kw_only=True)
        class SGD(Part):
            pass
        """,
        {"sgd": "stranger_sgd:SGD"},
    )
    with pytest.raises(UserError, match="mofo and stranger_sgd cannot be combined: each brings an optimizer"):
        registry.build({"stranger_sgd": {}, "mofo": {}})


@pytest.mark.parametrize(
    "code, message",
    [
        (
            "import no_such_package",
            "the part 'odd' .* does not load: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("Odd = 3", "the part 'odd' .* is not registered"),
    ],
)
def test_a_strangers_broken_part_is_named(package, code, message):
    package("stranger_odd", code, {"odd": "stranger_odd:Odd"})
    with pytest.raises(UserError, match=message):
        registry.parts()


@pytest.mark.parametrize("code, name", [(L2SP, "L2SP"), ("Odd = 3", "CLASS")])
def test_an_entry_point_to_a_module_is_told_the_line_that_works(package, code, name):
    package("stranger_module", code, {"odd": "stranger_module"})
    with pytest.raises(UserError, match=f'is a module: name the class in it, odd = "stranger_module:{name}"'):
        registry.parts()


def test_the_list_and_the_pages_say_what_the_registry_says(capsys):
    from methods import listing

    assert main([]) == 0
    listed = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert listed == [[key, part.line] for key, part in registry.parts().items()] and len(listed) >= 30
    assert main(list(registry.parts())) == 0
    shown = capsys.readouterr().out
    for key, part in registry.parts().items():
        page = (ROOT / "docs/methods" / f"{key}.md").read_text()
        assert page == listing.with_block(page, part), f"docs/methods/{key}.md is behind: run `python -m methods docs`"
        for text in (part.title, part.paper, part.line, *(f.name for f in dataclasses.fields(part))):
            assert text in shown and text in page
    assert "fraction   0.1" in shown and "strength         1.0e-3" in shown and "(0, 1]" in shown
    assert main(["sam", "muon"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if line[:1].strip()] == ["sam", "muon"]
    assert f"not beside adapter: {registry.part('muon').excludes['adapter']}" in shown
    assert main(["mun"]) == 2 and "unknown part 'mun': did you mean 'muon'?" in capsys.readouterr().err
    assert main(["--help"]) == 0 and "python -m methods KEY" in capsys.readouterr().out


def test_a_list_that_is_not_read_to_its_end_is_no_error():
    command = f"'{sys.executable}' -m methods {' '.join(registry.built_in())} | true"
    ran = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stderr == ""
