"""Options of Pyro's that our objectives accept, and that do nothing here."""

from collections.abc import Mapping

from pyproelbo._messages.warn import warn
from pyproelbo._terms.traces import Traces


class IgnoredOptionWarning(UserWarning):
    """An option of Pyro's ``ELBO`` does nothing here; the message names the alternative."""


_INSTEAD = {  # of options of Pyro's ELBO: a default, and what there is here
    "tail_adaptive_beta": (-1.0, "pyproelbo.RenyiELBO weighs the tails"),
    "jit_options": (None, "compile=True, or pyproelbo.Capture(options=...), compiles steps"),
    "ignore_jit_warnings": (False, "filter pyproelbo.CaptureWarning"),
    "strict_enumeration_warning": (None, "latents are enumerated where the guide asks for it"),
}


def warn_of_ignored(options: Mapping[str, object]) -> None:
    """Warn of keywords that differ from their defaults."""
    for name, (default, instead) in _INSTEAD.items():
        if options.get(name) and options[name] != default:
            warn(f"{name}={options[name]!r} does nothing here: {instead}", IgnoredOptionWarning)


def warn_of_baselines(traces: Traces) -> bool:
    """Warn of the guide's sites that ask for a baseline; whether there are any."""
    names = [name for name, site in traces.guide_sites.items() if "baseline" in site["infer"]]
    if names:
        warn(
            f"the baselines of {', '.join(names)} do nothing here, and do not learn: weights of "
            "several draws have baselines of their own. BetaELBO uses the guide's",
            IgnoredOptionWarning,
        )
    return bool(names)
