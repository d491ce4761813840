"""The package as a whole: what it ships, and that imports point one way."""

import ast
import configparser
import graphlib
import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import pyproelbo as pe

ROOT = Path(__file__).parent.parent
FOLDERS = {"pyproelbo": "pyproelbo", "pyproelbo.models": "models", "pyproelbo.guides": "guides"}


def modules():
    """Path of each module of the installed namespace, by name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports(path, known):
    """Modules of ours that a file imports when it is imported itself."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in known}


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imports(path, known) - {name} for name, path in known.items()}


def test_no_import_cycles(graph):
    # a package's __init__ imports its modules, which may name the package they are in
    inits = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {n: {t for t in ts if t not in inits} for n, ts in graph.items() if n not in inits}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_the_library_never_imports_the_zoo_but_for_the_command(graph):
    for name, targets in graph.items():
        if not name.startswith(("pyproelbo.models", "pyproelbo.guides", "pyproelbo.cli")):
            assert not any(t.startswith(("pyproelbo.models", "pyproelbo.guides")) for t in targets)
        if name.startswith("pyproelbo.models"):
            assert not any(t.startswith("pyproelbo.guides") for t in targets)


def test_numerics_know_nothing_of_objectives(graph):
    order = [
        "schedules",
        "kl",
        "traces",
        "expectations",
        "by_time",
        "terms",
        "sites",
        "divergences",
        "collect",
        "minibatch",
        "elbo",
    ]
    for i, name in enumerate(order[:-1]):
        for later in order[i + 1 :]:
            assert f"pyproelbo.{later}" not in graph[f"pyproelbo.{name}"], (name, later)
    for name in ("schedules", "owners", "aggregate", "stacking", "notes"):
        assert not graph[f"pyproelbo.{name}"]
    for name in ("kl", "marginals"):
        assert graph[f"pyproelbo.{name}"] == {"pyproelbo.owners"}
    assert graph["pyproelbo.row_noise"] == {"pyproelbo.owners", "pyproelbo.stacking"}
    assert graph["pyproelbo.batches"] == {"pyproelbo.arguments", "pyproelbo.evaluating"}
    sequences = {name for name in graph if name.startswith("pyproelbo.sequences")}
    below = ("kl", "roles", "sequences.base")
    assert graph["pyproelbo.masks"] == {f"pyproelbo.{name}" for name in below}
    below = ("densities", "kept_samples", "masks", "roles", "sequences.base", "value_shapes")
    assert graph["pyproelbo.traces"] == {f"pyproelbo.{name}" for name in below}
    for name in sequences:
        assert graph[name] <= sequences | {"pyproelbo.stacking"}, name
    priors = {name for name in graph if name.startswith("pyproelbo.priors")}
    for name in priors:
        below = {"aggregate", "marginals", "sharing", "stacking"}
        assert graph[name] <= priors | {f"pyproelbo.{n}" for n in below}, name


def test_reports_know_nothing_of_objectives_and_figures_only_of_reports(graph):
    report = "pyproelbo.surgery"
    distributions = {"pyproelbo.marginals", "pyproelbo.priors.mixture"}
    evidence = {f"pyproelbo.{n}" for n in ("evidence.gaps", "evidence.psis", "calibration")}
    results = {report, "pyproelbo.by_time"} | distributions | evidence
    plots = {name for name in graph if name.startswith("pyproelbo.plots")}
    for name, targets in graph.items():
        if name == report or name in graph[report]:
            assert not any(t.startswith("pyproelbo.elbo") for t in targets), name
        if not name.startswith(("pyproelbo.plots", "pyproelbo.cli")) and name != "pyproelbo":
            assert not targets & plots, name
    for name in plots:
        assert graph[name] <= plots | results, name


def test_all_packages_are_listed():
    """setup.cfg lists packages by hand, since mapped folders are not found by themselves."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    present = {n for n, path in modules().items() if path.name == "__init__.py"}
    assert listed == present


def test_public_names():
    promised = {
        "TermsELBO",
        "Terms",
        "BetaELBO",
        "CapacityELBO",
        "FreeBitsELBO",
        "ImportanceWeightedELBO",
        "SequentialELBO",
        "ParticleFilterELBO",
        "RenyiELBO",
        "ReweightedWakeSleepELBO",
        "SurgeryELBO",
        "TotalCorrelationELBO",
        "MinibatchSurgery",
        "Surgery",
        "Capture",
        "CaptureWarning",
        "SharedOptim",
        "Annealed",
        "Evidence",
        "UnfinishedWarning",
        "Decompositions",
        "decompositions",
        "InferenceGap",
        "inference_gap",
        "Calibration",
        "calibration",
        "Loo",
        "loo",
        "Convergence",
        "convergence",
        "Check",
        "check",
        "Psis",
        "psis",
        "pareto_smooth",
        "evidence",
        "from_svi",
        "surgery",
        "log_aggregate_posterior",
        "priors",
        "VampPrior",
        "schedules",
        "sequences",
        "NonFiniteWarning",
        "NoParametersWarning",
        "IgnoredOptionWarning",
        "UntrainedWarning",
        "LoopedWarning",
        "MaskWarning",
        "SkippedWarning",
    }
    public = {name for name in dir(pe) if not name.startswith(("_", "plot_"))}
    submodules = {n.split(".")[1] for n in modules() if n.count(".") == 1}
    assert promised <= public <= promised | submodules
    for name in promised:
        assert getattr(pe, name).__doc__


def test_a_function_is_never_hidden_by_the_module_of_its_name():
    """Whichever of the two is asked for first; each of the trials in a process of its own."""
    trials = (
        "import pyproelbo as pe",
        "import pyproelbo.surgery, pyproelbo.evidence.psis, pyproelbo.cli; import pyproelbo as pe",
        "import pyproelbo as pe; pe.BetaELBO; from pyproelbo.check import Check",
        "from pyproelbo.loo import loo; import pyproelbo as pe; pe.calibration; import "
        "pyproelbo.calibration, pyproelbo.convergence",
    )
    names = ("surgery", "check", "calibration", "evidence", "loo", "convergence")
    script = "import os, torch, pyro, types\n" + "".join(
        f"if os.fork() == 0:\n    {trial}\n"
        f"    named = [pe.__dict__.get(n, None) or getattr(pe, n) for n in {names}]\n"
        "    os._exit(sum(isinstance(x, types.ModuleType) for x in named))\n"
        "assert os.wait()[1] == 0\n"
        for trial in trials
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_package_imports_nothing_heavy():
    script = (
        "import sys, pyproelbo, pyproelbo.cli.app; "
        "assert not {'torch', 'pyro', 'numpy', 'matplotlib'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_all_public_names_come_by_a_star_and_can_be_pickled():
    names = {}
    exec("from pyproelbo import *", names)
    assert names["surgery"] is pe.surgery and names["plot_surgery"] is pe.plot_surgery
    assert pickle.loads(pickle.dumps(pe.BetaELBO)) is pe.BetaELBO
    assert isinstance(pe.BetaELBO(), pe.TermsELBO)
    assert inspect.ismodule(pe.schedules) and pe.sequences.loops.plain


def test_a_clone_finds_models_and_guides_beside_the_package(tmp_path):
    """As after `pip install .` in a clone, where the folder hides what is installed."""
    for folder in ("pyproelbo", "models", "guides"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    script = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
        "import pyproelbo.models.vae, pyproelbo.guides.vae; "
        "print(pyproelbo.models.vae.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(tmp_path / "models" / "vae.py")


def test_plots_are_there_when_asked_for():
    for name in (
        "aggregate_posterior",
        "calibration",
        "elbo_trace",
        "evidence_gap",
        "khat",
        "kl_by_time",
        "kl_per_dim",
        "pseudo_inputs",
        "rate_distortion",
        "reconstruction_by_time",
        "reconstructions",
        "surgery",
    ):
        assert getattr(pe, f"plot_{name}").__doc__
        assert f"plot_{name}" in dir(pe)


def test_lightning_is_there_when_asked_for():
    pytest.importorskip("lightning")
    assert pe.lightning.ELBOTask.__doc__
    with pytest.raises(AttributeError, match="no attribute 'lightening'"):
        _ = pe.lightening
