"""Lightning's Trainer over tiny programs: numbers, resuming, processes, complaints."""

import functools
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyproelbo as pe
from pyproelbo.datasets import Minibatches
from pyproelbo.lightning import ELBOTask, UnfinishedScheduleWarning
from pyproelbo.lightning.per_datum import num_rows
from pyproelbo.schedules import Linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
ADAM = functools.partial(torch.optim.Adam, lr=0.05)


class Model(PyroModule):
    """z ~ N(0, I), x ~ N(W z + b, scale^2)."""

    def __init__(self):
        super().__init__("model")
        self.net = nn.Linear(2, 3)
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)

    def forward(self, x, weight=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.scale).to_event(1), obs=x)


class Guide(PyroModule):
    def __init__(self):
        super().__init__("guide")
        self.net = nn.Linear(3, 4)

    def forward(self, x, weight=None):
        loc, raw = self.net(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


def global_model(x):
    """z ~ N(0, 1) for all data: the posterior is N(sum x / (n + 1), 1 / (n + 1))."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def make_task(seed=0, **kwargs):
    torch.manual_seed(seed)
    return ELBOTask(Model(), Guide(), pe.BetaELBO(**kwargs), ADAM)


def data(num=40):
    return torch.randn(num, 3, generator=torch.Generator().manual_seed(5)) @ torch.diag(
        torch.tensor([3.0, 1.0, 0.2])
    )


def loader(x, batch_size=10, shuffle=True):
    return DataLoader(TensorDataset(x), batch_size, shuffle=shuffle)


def whole(batch):
    """A loader of one batch as it is."""
    return DataLoader([batch], batch_size=None)


def make_trainer(epochs=1, callbacks=(), **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        enable_checkpointing=saves,
        **(quiet | kwargs),
    )


def parameters(task):
    return {name: value.detach().clone() for name, value in task.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# What a step computes


def test_loss_is_that_of_one_datum_and_metrics_add_up():
    task, x = make_task(beta=0.3), data()
    trainer = make_trainer(max_steps=1)
    trainer.fit(task, loader(x, len(x), shuffle=False), loader(x, shuffle=False))
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    terms = task.objective.last_terms
    assert metrics["train_elbo"] == pytest.approx(terms.elbo.item() / 40)
    for part in ("train", "val"):
        elbo, fit, kl = (metrics[f"{part}_{n}"] for n in ("elbo", "reconstruction", "kl"))
        assert elbo == pytest.approx(fit - kl)
        assert metrics[f"{part}_objective"] == pytest.approx(fit - 0.3 * kl)
    assert metrics["beta"] == pytest.approx(0.3)
    assert "train_kl/z" not in metrics
    assert {"train_elbo", "train_reconstruction", "train_kl", "beta"} <= set(
        trainer.progress_bar_metrics
    )


def test_kl_by_site_is_logged_where_there_are_several():
    class Two(PyroModule):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            a = pyro.sample("a", dist.Normal(self.loc[0], 1.0))
            pyro.sample("b", dist.Normal(a + self.loc[1], 1.0))

    def model(x):
        a = pyro.sample("a", dist.Normal(1.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    trainer = make_trainer(max_steps=1)
    trainer.fit(ELBOTask(model, Two(), pe.BetaELBO()), whole(torch.tensor(1.0)))
    metrics = trainer.callback_metrics
    assert metrics["train_kl/a"].item() == pytest.approx(0.5)
    total = metrics["train_kl/a"] + metrics["train_kl/b"]
    torch.testing.assert_close(total, metrics["train_kl"])


def test_training_is_that_of_the_objective_and_torch_by_hand():
    task, x = make_task(), data()
    torch.manual_seed(3)
    make_trainer(5).fit(task, whole(x))
    other = make_task()
    optimizer = ADAM(other.parameters())
    torch.manual_seed(3)
    loader = whole(x)
    for _ in range(5):
        for batch in loader:  # which draws a random number, too
            optimizer.zero_grad()
            (other.module(batch) / len(batch)).backward()
            optimizer.step()
    assert_same(parameters(task), parameters(other))
    assert task.objective.step == other.objective.step == 5


def test_captured_steps_train_as_eager_ones():
    """With gradients that are accumulated and clipped, while beta rises."""

    def trained(compile):
        task = make_task(beta=Linear(0.0, 1.0, 10), compile=compile)
        torch.manual_seed(3)
        trainer = make_trainer(4, accumulate_grad_batches=2, gradient_clip_val=0.5)
        trainer.fit(task, loader(data(), shuffle=False))
        return task

    ours, theirs = trained(pe.Capture(backend="eager")), trained(False)
    assert ours.objective._captured._structures
    assert ours.objective.step == theirs.objective.step == 8
    for name, value in parameters(ours).items():
        torch.testing.assert_close(value, parameters(theirs)[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "batch",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, torch.ones(len(x))),
        lambda x: {"x": x, "weight": torch.ones(len(x))},
    ],
    ids=["tensor", "list", "tuple", "dict"],
)
def test_batches_are_arguments(batch):
    task, reference = make_task(), make_task()
    torch.manual_seed(3)
    make_trainer().fit(task, whole(batch(data())))
    torch.manual_seed(3)
    make_trainer().fit(reference, whole(data()))
    assert_same(parameters(task), parameters(reference))


def test_validation_counts_no_step_and_leaves_last_terms():
    task = make_task()
    make_trainer().validate(task, loader(data(), shuffle=False), verbose=False)
    assert task.objective.step == 0 and task.objective.last_terms is None


def test_validation_is_the_mean_over_data_not_over_batches():
    task = make_task()
    trainer = make_trainer()
    trainer.validate(task, loader(data(), 12, shuffle=False), verbose=False)  # 12, 12, 12 and 4
    whole_kl = task.terms(data()).shrinkage / 40  # in closed form: it depends on no draw
    assert trainer.callback_metrics["val_kl"].item() == pytest.approx(whole_kl.item(), rel=1e-12)


WEIGHTS = {  # plate size, mask, scale of all sites, the weight of 6 rows
    "all data": (6, None, 1.0, 6.0),
    "a minibatch": (60, None, 1.0, 6.0),
    "padding": (60, torch.arange(6) < 4, 1.0, 4.0),
    "scaled by hand": (6, None, 10.0, 6.0),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_the_weight_of_a_batch_is_its_number_of_data(case):
    size, mask, scale, weight = WEIGHTS[case]

    def program(x, obs):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        masked = pyro.poutine.mask(mask=True if mask is None else mask)
        with pyro.plate("data", size, subsample=x), pyro.poutine.scale(scale=scale), masked:
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            if obs:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    model, guide = functools.partial(program, obs=True), functools.partial(program, obs=False)
    terms = pe.BetaELBO().terms(model, guide, torch.randn(6))
    assert num_rows(terms).item() == pytest.approx(weight)


def test_the_weight_of_a_batch_under_global_latents_is_its_part_of_the_data():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 60, subsample=x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    assert num_rows(pe.BetaELBO().terms(model, guide, torch.randn(6))).item() == 6 / 60


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_step_is_the_optimisers(accumulate):
    task = make_task(beta=Linear(0.0, 1.0, steps=2))
    trainer = make_trainer(2, accumulate_grad_batches=accumulate)
    trainer.fit(task, loader(data()))
    assert task.objective.step == trainer.global_step == 8 // accumulate


@pytest.mark.slow
def test_learns_the_exact_posterior():
    x = torch.tensor([1.0, 2.0, 3.0])
    task = ELBOTask(global_model, AutoNormal(global_model), pe.BetaELBO(num_particles=10), ADAM)
    make_trainer(400).fit(task, whole(x))
    with pyro.get_param_store().scope():
        q = task.guide.quantiles([0.5])["z"]
    assert float(q[0]) == pytest.approx(1.5, abs=0.1)
    terms = task.terms(x)
    assert terms.num_data == 1


def test_early_stopping_on_held_out_elbo():
    task = make_task()
    stop = EarlyStopping("val_elbo", mode="max", patience=1, min_delta=1e6)
    trainer = make_trainer(50, [stop])
    trainer.fit(task, loader(data()), loader(data(), shuffle=False))
    assert trainer.current_epoch < 5


# Resuming


class StopAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def _straight(make_loader, epochs=6):
    task = make_task(beta=Linear(0.0, 1.0, steps=20))
    torch.manual_seed(7)
    trainer = make_trainer(epochs)
    trainer.fit(task, make_loader(), loader(data(), shuffle=False))
    return task, {name: value.item() for name, value in trainer.callback_metrics.items()}


def _resume(path, make_loader, epochs=6):
    task = make_task(seed=99, beta=Linear(0.0, 1.0, steps=20))
    torch.randn(17)
    trainer = make_trainer(epochs)
    trainer.fit(task, make_loader(), loader(data(), shuffle=False), ckpt_path=path)
    return task, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyproelbo.lightning.UnfinishedScheduleWarning")
@pytest.mark.parametrize("how", ["after fit", "ModelCheckpoint"])
@pytest.mark.parametrize("loader_type", [DataLoader, Minibatches])
def test_a_fit_resumed_in_mid_annealing_has_the_numbers_of_one_straight_through(
    tmp_path, how, loader_type
):
    def shuffled():
        return Minibatches(data(), 10) if loader_type is Minibatches else loader(data())

    straight, metrics = _straight(shuffled)
    part = make_task(beta=Linear(0.0, 1.0, steps=20))
    torch.manual_seed(7)
    saver = [ModelCheckpoint(tmp_path, save_last=True)] if how == "ModelCheckpoint" else []
    trainer = make_trainer(3, saver)
    trainer.fit(part, shuffled(), loader(data(), shuffle=False))
    assert part.objective.step == 12
    if how == "after fit":
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed, again = _resume(tmp_path / "last.ckpt", shuffled)
    assert_same(parameters(straight), parameters(resumed))
    assert metrics == again and again["beta"] == 1.0
    assert resumed.objective.step == straight.objective.step == 24


@pytest.mark.filterwarnings("ignore::pyproelbo.lightning.UnfinishedScheduleWarning")
@pytest.mark.parametrize("step", [1, 6, 11])
def test_a_fit_resumes_within_an_epoch_if_its_loader_can(tmp_path, step):
    def minibatches():
        return Minibatches(data(), 10, seed=1)

    straight, metrics = _straight(minibatches)
    part = make_task(beta=Linear(0.0, 1.0, steps=20))
    torch.manual_seed(7)
    stop = StopAt(step, tmp_path / "mid.ckpt")
    make_trainer(6, [stop]).fit(part, minibatches(), loader(data(), shuffle=False))
    resumed, again = _resume(tmp_path / "mid.ckpt", minibatches)
    assert_same(parameters(straight), parameters(resumed))
    assert metrics == again


def test_an_autoguide_resumes(tmp_path):
    x = torch.tensor([1.0, 2.0, 3.0])

    def task():
        return ELBOTask(global_model, AutoNormal(global_model), pe.BetaELBO(), ADAM)

    def batches():
        return DataLoader(x, 3)

    torch.manual_seed(7)
    straight = task()
    make_trainer(6).fit(straight, batches())
    torch.manual_seed(7)
    trainer = make_trainer(2)
    trainer.fit(task(), batches())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = task()
    torch.randn(5)
    make_trainer(6).fit(resumed, batches(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(parameters(straight), parameters(resumed))


def test_checkpoints_load_without_trusting_them(tmp_path):
    trainer = make_trainer()
    trainer.fit(make_task(beta=Linear(0.0, 1.0, steps=4)), loader(data()))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert state["state_dict"]["module.elbo._extra_state"] == {"step": 4}


def test_unfinished_schedules_warn():
    task = make_task(beta=Linear(0.0, 1.0, steps=2000))
    with pytest.warns(UnfinishedScheduleWarning, match="step 4, but beta changes until step 2000"):
        make_trainer().fit(task, loader(data()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnfinishedScheduleWarning)
        make_trainer().fit(make_task(beta=Linear(0.0, 1.0, steps=4)), loader(data()))


# Whose parameters


def test_two_tasks_share_nothing_and_the_store_stays_as_it_was():
    pyro.param("mine", torch.tensor(1.0))
    first, second = make_task(0), make_task(1)
    make_trainer(2).fit(first, loader(data()))
    after_first, before_second = parameters(first), parameters(second)
    assert not torch.equal(
        after_first["module.model.net.weight"], next(iter(before_second.values()))
    )
    make_trainer(2).fit(second, loader(data()))
    assert_same(parameters(first), after_first)
    assert any((parameters(second)[n] != value).any() for n, value in before_second.items())
    assert list(pyro.get_param_store()) == ["mine"]


def test_what_svi_left_in_the_store_is_not_trained():
    model, guide = Model(), Guide()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.5}), pe.BetaELBO())
    for _ in range(3):
        svi.step(data())
    trained = make_task(1)
    make_trainer(1).fit(trained, whole(data()))
    torch.manual_seed(1)
    fresh = Model()
    moved = trained.model.net.weight - fresh.net.weight
    assert 0 < moved.abs().max() < 0.06  # one step of Adam, from its own start


def test_training_goes_on_from_what_load_state_dict_loaded():
    source, task = make_task(1), make_task(2)
    make_trainer(2).fit(source, loader(data()))
    make_trainer(1).fit(task, loader(data()))
    task.load_state_dict(source.state_dict())
    assert task.objective.step == source.objective.step
    for each in (task, source):
        torch.manual_seed(4)
        make_trainer(1).fit(each, whole(data()))
    assert_same(parameters(task), parameters(source))


def test_pyro_validation_and_local_parameters_may_be_set():
    with pyro.settings.context(module_local_params=True):
        task = make_task()
        make_trainer(1).fit(task, whole(data()))
    other = make_task()
    torch.manual_seed(0)
    assert any((parameters(other)[n] != value).any() for n, value in parameters(task).items())


# Complaints


def test_programs_without_modules_are_refused():
    with pytest.raises(ValueError, match=r"should be an nn\.Module"):
        ELBOTask(global_model, global_model, pe.BetaELBO())


def test_optimisers_for_svi_are_refused():
    shared = pe.SharedOptim(torch.optim.Adam, {"lr": 0.01})
    for optimizer in (shared, pyro.optim.Adam({"lr": 0.01})):
        with pytest.raises(ValueError, match=r"for pyro\.infer\.SVI: give a class of torch\.optim"):
            ELBOTask(Model(), Guide(), pe.BetaELBO(), optimizer)
    task = ELBOTask(Model(), Guide(), pe.BetaELBO(), lambda parameters: shared)
    with pytest.raises(ValueError, match="optimizer is a SharedOptim"):
        make_trainer().fit(task, whole(data()))


def test_modules_without_parameters_are_refused():
    class Empty(PyroModule):
        def forward(self, x):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no parameters to train"):
        make_trainer().fit(ELBOTask(global_model, Empty(), pe.BetaELBO()), whole(torch.ones(2)))


def test_pyro_param_is_refused():
    class Stray(Guide):
        def forward(self, x):
            pyro.param("stray", torch.tensor(1.0))
            super().forward(x)

    task = ELBOTask(Model(), Stray(), pe.BetaELBO())
    with pytest.raises(ValueError, match=r"pyro.param\('stray'\) is not a parameter"):
        make_trainer().fit(task, whole(data()))


def test_parameters_made_too_late_are_refused():
    class Late(Guide):
        @PyroParam
        def shift(self):
            return torch.zeros(3)

        def forward(self, x):
            super().forward(x + self.shift)

    task = ELBOTask(Model(), Late(), pe.BetaELBO())
    with pytest.raises(ValueError, match=r"does not have guide\.shift_unconstrained"):
        make_trainer().fit(task, whole(data()))
    task.terms(data())
    make_trainer().fit(task, whole(data()))


def test_non_contiguous_parameters_are_the_modules_own():
    task = make_task()
    task.guide.net.weight = nn.Parameter(torch.randn(3, 4).t())
    assert not task.guide.net.weight.is_contiguous()
    before = task.guide.net.weight.detach().clone()
    make_trainer().fit(task, whole(data()))
    assert not torch.equal(before, task.guide.net.weight)


def test_lazy_layers_are_made_before_the_optimiser():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(4)

        forward = Guide.forward

    task = ELBOTask(Model(), Lazy(), pe.BetaELBO(), ADAM)
    make_trainer().fit(task, loader(data()))
    assert task.guide.net.weight.shape == (4, 3)


# Processes of their own


def _python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)


def test_importing_the_library_does_not_import_lightning():
    code = "import sys, pyproelbo; sys.exit('lightning' in sys.modules)"
    assert _python(code).returncode == 0


@pytest.mark.slow
def test_without_lightning_the_message_says_what_to_install():
    done = _python("import sys; sys.modules['lightning'] = None; import pyproelbo.lightning")
    assert "ImportError: pyproelbo.lightning needs Lightning: pip install pyproelbo[lightning]" in (
        done.stderr
    )
