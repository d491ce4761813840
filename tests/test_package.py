"""The package as a whole: what it ships, and that imports point one way."""

import ast
import configparser
import graphlib
import inspect
import os
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


def imported(path):
    """What a file imports, by full name, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return names


@pytest.fixture(scope="module")
def graph():
    known = modules()
    return {name: imported(path) & known.keys() - {name} for name, path in known.items()}


def test_no_import_cycles(graph):
    # a package's __init__ imports its modules, which may name the package they are in
    inits = {name for name, path in modules().items() if path.name == "__init__.py"}
    graph = {n: {t for t in ts if t not in inits} for n, ts in graph.items() if n not in inits}
    list(graphlib.TopologicalSorter(graph).static_order())


# From the bottom to the top: what stands in a row imports only what stands before it.
ORDER = (
    "pyproelbo",
    "schedules",
    "_files",
    "_processes",
    "datasets",
    "_messages",
    "_backend",
    "_results",
    "_distributions",
    "sequences",
    "priors",
    "_terms",
    "_rows",
    "capture",
    "elbo",
    "_optim",
    "_surgery",
    "_evidence",
    "_diagnostics",
    "_arviz",
    "_fitting",
    "plots",
    "lightning",
    "models",
    "guides",
    "cli",
    "__main__",
)


REPORTS = {"_surgery", "_evidence", "_diagnostics", "_fitting"}
LOW = {"_backend", "_results"}


def unit(name):
    """The package or the module, right below pyproelbo, that a module is in."""
    return name.split(".")[1] if "." in name else name


def test_imports_point_one_way_in_the_order_of_the_packages(graph):
    assert {unit(name) for name in graph} == set(ORDER)
    for name, targets in graph.items():
        for target in targets:
            if unit(target) != unit(name):
                assert ORDER.index(unit(target)) < ORDER.index(unit(name)), (name, target)


def test_the_library_never_imports_the_zoo_but_for_the_command(graph):
    for name, targets in graph.items():
        if unit(name) not in ("models", "guides", "cli"):
            assert not {unit(target) for target in targets} & {"models", "guides"}, name


def test_reports_know_nothing_of_objectives_and_figures_only_of_reports(graph):
    for name, targets in graph.items():
        known = {unit(target) for target in targets}
        if unit(name) in ("_surgery", "_evidence", "_diagnostics", "_arviz"):
            assert not known & {"elbo", "capture"}, name
        if unit(name) == "plots":
            assert known <= {"plots", "priors", *LOW, "_distributions", "_terms"} | REPORTS, name


def test_results_know_nothing_of_what_returns_them(graph):
    for name, targets in graph.items():
        if unit(name) == "_results":
            assert {unit(target) for target in targets} <= {"_files", "_results", "_messages"}, name


def test_what_tests_share_is_in_helpers_and_not_in_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        for name in imported(path):
            assert not any(part.startswith("test_") for part in name.split(".")), (path, name)


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
        "CorrectionWarning",
        "Evidence",
        "LinearResponse",
        "linear_response",
        "Sensitivity",
        "sensitivity",
        "GradientNoise",
        "gradient_noise",
        "Moments",
        "moments",
        "UnfinishedWarning",
        "Decompositions",
        "decompositions",
        "InferenceGap",
        "inference_gap",
        "Repair",
        "repair",
        "Calibration",
        "Refit",
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
        "fit",
        "FisherDivergence",
        "fisher_divergence",
        "Fit",
        "FixedDraws",
        "History",
        "NotConvergedWarning",
        "Sobol",
        "SemiAmortised",
        "Stochastic",
        "surgery",
        "surgery_part",
        "SurgeryPart",
        "log_aggregate_posterior",
        "priors",
        "VampPrior",
        "schedules",
        "sequences",
        "NonFiniteWarning",
        "NoParametersWarning",
        "IgnoredOptionWarning",
        "UntrainedWarning",
        "Shard",
        "load_result",
        "merge",
        "LongRunWarning",
        "LostWorkerWarning",
        "LoopedWarning",
        "SharedParametersWarning",
        "MaskWarning",
        "SkippedWarning",
    }
    modules_of_users = {"capture", "cli", "datasets", "elbo", "guides", "lightning", "models"}
    modules_of_users |= {"plots", "__version__"}
    public = {name for name in dir(pe) if not name.startswith("plot_")}
    assert public == promised | modules_of_users
    assert not {name for name in vars(pe) if not name.startswith("_")} - {*dir(pe)}
    for name in promised:
        assert getattr(pe, name).__doc__


def test_no_module_is_called_like_a_function(graph):
    """A name is one thing, whichever way it is imported."""
    for name in dir(pe):
        assert (f"pyproelbo.{name}" in graph) == inspect.ismodule(getattr(pe, name)), name
    run_script(
        "import pyproelbo.cli, pyproelbo as pe; assert not {*vars(pe)} & {'surgery', 'check'}"
    )


# What takes long to load, and is loaded where it is used.
LATE = {"scipy.special", "scipy.stats", "xarray", "pandas", "arviz", "matplotlib", "lightning"}
LATE |= {"typer", "rich", "sklearn", "pyarrow"}


def run_script(script):
    """Run by a fresh interpreter."""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "pyro", "numpy", *LATE}
    run_script(f"import sys, pyproelbo; assert not {heavy} & {{*sys.modules}}")


def test_names_are_loaded_without_what_only_calls_of_them_need():
    """All but the figures, and the modules that are there for a library: theirs."""
    apart = ("cli", "lightning", "plots")
    names = [n for n in dir(pe) if not n.startswith("plot_") and n not in apart]
    run_script(
        f"import sys, pyproelbo as pe; [getattr(pe, name) for name in {names}]; "
        f"late = {LATE} & {{*sys.modules}}; assert not late, late"
    )


def test_help_needs_no_torch():
    commands = [[], ["fit"], ["surgery"], ["check"]]
    run_script(
        "import sys; from pyproelbo.__main__ import main; "
        f"assert not any(main([*command, '--help']) for command in {commands}); "
        "assert not {'torch', 'pyro', 'numpy', 'matplotlib'} & {*sys.modules}"
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each is tried in a copy of one process")
def test_every_public_name_can_be_imported_first():
    """That is, the module that it comes from."""
    homes = {f"{home}.{name}" if home == "pyproelbo" else home for name, home in pe._HOMES.items()}
    run_script(
        "import os, matplotlib.pyplot, pyro.infer\n"
        "from importlib import import_module\n"
        f"for name in {sorted(homes)}:\n"
        "    if not (child := os.fork()):\n"
        "        import_module(name)\n"
        "        os._exit(0)\n"
        "    assert os.waitpid(child, 0)[1] == 0, name\n"
    )


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
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=env,
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == str(tmp_path / "models" / "vae.py")


def test_plots_are_there_when_asked_for():
    """Those of pyproelbo.plots, all of them, by the same names."""
    names = {name for name in vars(pe.plots) if name.startswith("plot_")}
    assert names == {name for name in dir(pe) if name.startswith("plot_")}
    for name in names:
        assert getattr(pe, name) is getattr(pe.plots, name) and getattr(pe, name).__doc__


def test_lightning_is_there_when_asked_for():
    pytest.importorskip("lightning")
    assert pe.lightning.ELBOTask.__doc__
    with pytest.raises(AttributeError, match="no attribute 'lightening'"):
        _ = pe.lightening
