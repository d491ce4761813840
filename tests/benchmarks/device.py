"""What counts on a GPU, in one table, for a machine that is there for a few minutes.

    python tests/benchmarks/device.py [--device cuda] [--seconds 10] [--data 60000 1000000]

Training steps at four sizes: Pyro's, eager ones, captured ones (on a GPU as CUDA graphs), torch by
hand, and torch by hand as a CUDA graph; milliseconds, medians of turns in one process, and how many
fit into one of Pyro's. The density of the aggregate posterior beside the bare product of matrices
in its dtype, and the memory that it takes. Surgery of data sets of PPCA with 20 latents. A part
that fails is a line of the table, and the others go on.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import pyro
import torch
from aggregate import data
from pyro.infer import Trace_ELBO
from step import in_turns
from whole_step import PROGRAMS, Training, objective, pyro_svi, shared_adam, svi, trained

import pyproelbo as pe
from pyproelbo._distributions.mixture_kernel import log_aggregate_posterior
from pyproelbo.guides.ppca import Exact
from pyproelbo.models.ppca import PPCA

LEARNING_RATE = 1e-3
LATENTS, FEATURES = 20, 50
MAX_PAIRS = 2 * 10**10  # of surgery
Rows = Iterator[tuple[str, ...]]


def graphed_by_hand(training: Training) -> Callable[[], float] | None:
    """The step by hand, with torch's fused Adam, as one CUDA graph."""
    parameters = list(training.module.parameters())
    if training.by_hand is None or parameters[0].device.type != "cuda":
        return None
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True, capturable=True)

    def step() -> torch.Tensor:
        adam.zero_grad(set_to_none=True)
        loss = training.by_hand()
        loss.backward()
        adam.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()

    def replay() -> float:
        graph.replay()
        return loss.item()

    return replay


def captured(**options: object) -> Callable[[Training], Callable[[], object]]:
    """Steps of SVI with a captured objective."""
    return svi(lambda: pe.BetaELBO(compile=pe.Capture(**options)), shared_adam)  # pyright: ignore


CONTENDERS = {
    "SVI, Trace_ELBO": pyro_svi(Trace_ELBO),
    "SVI, BetaELBO, SharedOptim": svi(pe.BetaELBO, shared_adam),
    "the same, captured, uncompiled": captured(backend="eager"),
    "the same, captured, compiled": captured(background=False),
    "the same, losses not read": captured(background=False, lazy_loss=True),
    "BetaELBO captured, compiled": trained(objective(compile=pe.Capture(background=False))),
    "torch by hand": trained(lambda training: training.by_hand),
    "torch by hand, CUDA graph": graphed_by_hand,
}
SIZES = (
    "VAE 784-64-8, batch 32",
    "VAE 784-400-20, batch 128",
    "VAE 784-300-300-40, VampPrior of 500, batch 100",
    "DMM, z 100, RNN 600, T = 129, batch 20",
)


def synchronised(device: str) -> Callable[[], object]:
    """What waits for the device."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def of_steps(device: str, seconds: float, program: str) -> Rows:
    """Milliseconds of a step of each contender."""
    steps = {}
    for name, make in CONTENDERS.items():
        pyro.set_rng_seed(0)
        try:
            step = make(PROGRAMS[program](device))
            if step is None:
                continue
            for _ in range(20):  # until all is compiled, and has taken its turns
                step()
        except Exception as error:
            yield program, name, f"fails: {str(error).partition(chr(10))[0][:120]}", ""
            continue
        steps[name] = step
    times = in_turns(steps, seconds, synchronised(device))
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, value in medians.items():
        yield program, name, f"{value:.3f} ms", f"{medians['SVI, Trace_ELBO'] / value:.2f}"


def of_kernel(device: str, seconds: float) -> Rows:
    """The aggregate posterior's density beside a product of matrices of its size."""
    num_points = 20_000 if device.startswith("cuda") else 500
    z, loc, scale = (x.to(device) for x in data(num_points, 60_000, 40))
    left = torch.randn(len(z), 81, dtype=torch.float64, device=device)
    right = torch.randn(81, len(loc), dtype=torch.float64, device=device)

    def product() -> None:
        for rows in left.split(1_000):
            rows @ right

    wait = synchronised(device)
    each = {"float64 product": product, "density": lambda: log_aggregate_posterior(z, loc, scale)}
    for run in each.values():
        run()
    wait()
    times = in_turns(each, seconds, wait)
    bare, ours = (statistics.median(x) for x in times.values())
    rate = 2 * len(z) * len(loc) * 81 / bare * 1e-9
    what = f"q(z) at {len(z):,} points of {len(loc):,}, D = 40"
    yield what, "float64 product", f"{bare:.0f} ms", f"{rate:.2f} TFLOP/s"
    yield what, "density", f"{ours:.0f} ms", f"{bare / ours:.2f} of the product's speed"
    exact = log_aggregate_posterior(*(x.double() for x in (z[:100], loc, scale)))
    error = (log_aggregate_posterior(z[:100], loc, scale) - exact).abs().max()
    yield what, "error beside float64", f"{error.item():.1e} nats", ""


def of_surgery(device: str, _: float, num_data: int) -> Rows:
    """Surgery of a data set whose parts are known."""
    x = torch.randn(num_data, FEATURES, device=device) @ torch.randn(
        FEATURES, FEATURES, device=device
    )
    ppca = PPCA.optimum(x, num_latents=LATENTS)
    options = {"max_pairs": MAX_PAIRS} if num_data**2 > MAX_PAIRS else {}
    start = time.perf_counter()
    found = pe.surgery(ppca, Exact(ppca), x, batch_size=4096, progress=False, **options)
    seconds = time.perf_counter() - start
    what = f"surgery of {num_data:,} x {LATENTS}" + ", max_pairs" * bool(options)
    error = found.stderr["mutual_information"]
    said = f"I(n; z) = {found.mutual_information:.3f} ± {error:.3f}"
    yield what, said, f"{seconds:.1f} s", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--data", type=int, nargs="*", default=[60_000, 1_000_000])
    parser.add_argument("--programs", nargs="*", choices=SIZES, default=SIZES)
    options = parser.parse_args()
    pyro.enable_validation(False)
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    print(
        f"torch {torch.__version__}, pyro {pyro.__version__}, Python {platform.python_version()}, "
        f"{name}, validation off\n\n| | | | beside the first |\n|---|---|---|---|"
    )
    parts = [
        *((of_steps, program) for program in options.programs),
        (of_kernel,),
        *((of_surgery, num) for num in options.data),
    ]
    for function, *which in parts:
        try:
            for row in function(options.device, options.seconds, *which):
                print("| " + " | ".join(row) + " |", flush=True)
        except Exception as error:
            print(f"| {function.__name__} {which} | fails | {str(error)[:200]!r} | |", flush=True)
        if options.device.startswith("cuda"):
            memory = torch.cuda.max_memory_allocated() / 2**20
            print(
                f"| {function.__name__} {which} | peak memory | {memory:,.0f} MiB | |", flush=True
            )
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
