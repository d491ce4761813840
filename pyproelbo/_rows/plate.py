"""Latents of single data: which they are, and the plate over the data."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pyro.distributions import MaskedDistribution
from torch import Tensor

from pyproelbo._backend.captures import is_captured
from pyproelbo._distributions.layers import layers
from pyproelbo._terms.terms import Latent, Terms
from pyproelbo._terms.traces import PARTICLES, Plate, Plates


def chosen(terms: Terms, site: str | Sequence[str] | None) -> dict[str, Latent]:
    """The latents that ``site`` names, None for all, by the keys of ``terms.kl``.

    Sites that share a KL are chosen together. With several looped particles the latents are those
    of the first.

    Raises:
        ValueError: for a site that does not exist, and for one not drawn at a single site of the
            guide.
    """
    if not terms.kl:
        raise ValueError("there is no latent site, and so no q(z): sample one in the guide")
    keys = list(terms.kl)
    if site is not None:
        owner = {n: key for key, names in terms.groups.items() for n in (key, *names)}
        names = [site] if isinstance(site, str) else list(site)
        for name in names:
            if name not in owner:
                raise ValueError(
                    f"site names {name!r}, but the latent sites are {sorted(terms.kl)}: name one "
                    "of those"
                )
        keys = list(dict.fromkeys(owner[name] for name in names))
    if not (terms.latents or terms.enumerated):
        raise ValueError(
            "these Terms have been detached, and no longer hold latents: take those that "
            "objective.terms(model, guide, ...) returns"
        )
    for key in keys:
        if not terms.latents or any(key not in latents for latents in terms.latents):
            raise ValueError(
                f"the KL of {key!r} does not belong to one sample: latents that are enumerated, "
                "fixed to a value, or made from several random sites have no q(z) here. Choose "
                "others by site="
            )
    return {key: terms.latents[0][key] for key in keys}


def data_plate(
    latents: Mapping[str, Plates], name: str | None = None, num_rows: int | None = None
) -> Plate:
    """The plate that all the latents share.

    Args:
        latents: their plates, by name.
        name: of the plate, if they share several.
        num_rows: the number of data, where known.

    Raises:
        ValueError: where there is none, or more than one.
    """
    plates = {
        key: {plate.name: plate for plate in found if plate.name != PARTICLES}
        for key, found in latents.items()
    }
    for key, of_latent in plates.items():
        if not of_latent:
            raise ValueError(
                f"site {key!r} is in no plate: a global latent has one posterior for all data, and "
                "not a q(z | x) for each. pe.from_svi and pe.loo accept it. Where there is site=, "
                f"choose latents of single data. {_held(key)}"
            )
        if name is not None and name not in of_latent:
            raise ValueError(f"site {key!r} is in plates {sorted(of_latent)}, not in {name!r}")
    shared = set.intersection(*map(set, plates.values()))
    first = next(iter(plates.values()))
    if name is None and not shared:
        raise ValueError(f"sites {sorted(plates)} are in no plate together: choose some by site=")
    found = [first[n] for n in sorted(shared) if name in (None, n)]
    if num_rows is not None:
        found = [plate for plate in found if plate.size == num_rows]
    if not found:
        raise ValueError(
            f"sites {sorted(plates)} are in plates {sorted(shared)}, none of which has {num_rows} "
            "rows, one for each datum of a batch: put the plate over the data around them"
        )
    if len(found) > 1:
        raise ValueError(
            f"sites {sorted(plates)} are in plates {sorted(p.name for p in found)}: name the one "
            "over the data by plate="
        )
    return found[0]


def check_all_in_plate(terms: Terms, plate: Plate, num_rows: int) -> None:
    """Check that every term of the ELBO belongs to rows.

    Raises:
        ValueError: for one outside the plate.
    """
    parts = {"observed": terms.log_likelihood, "latent": terms.kl, "factor": terms.factors}
    for role, values in parts.items():
        for name, value in values.items():
            if value.dim() < -plate.dim or value.shape[plate.dim] != num_rows:
                why = "an ELBO per datum has only terms of single data"
                raise ValueError(
                    f"the {role} site {name!r} is outside the plate {plate.name!r}, but {why}: "
                    + (
                        f"a global latent has one posterior for all data. {_held(name)}"
                        if role == "latent"
                        else f"move it into the plate. If it is a latent: {_held(name)}"
                    )
                )


def _held(name: str) -> str:
    """How to hold a latent at a value, in model and guide, if not in an AutoGuide's joint draw."""
    if name.startswith("_Auto"):
        return "An AutoGuide with a joint draw has one posterior for all of its latents"
    return (
        "To hold it at a value v, use poutine.block(poutine.condition(program, "
        f"data={{{name!r}: v}}), hide=[{name!r}]) for model and guide"
    )


def by_row(values: Iterable[Tensor], num_particles: int, plate: Plate | None) -> Tensor:
    """The sum of tensors of :class:`~pyproelbo.Terms` over all dims except particles and rows.

    Returns:
        (num_particles, B), without the scale of the plate; (num_particles, 1) without a plate;
        a zero that broadcasts where there are no tensors.
    """
    total: Tensor | None = None
    for value in values:
        keep = {0} if num_particles > 1 else set[int]()
        if plate is not None:
            keep.add(value.dim() + plate.dim)
        drop = [dim for dim in range(value.dim()) if dim not in keep]
        value = (value.sum(drop) if drop else value).reshape(num_particles, -1)
        total = value if total is None else total + value
    return torch.zeros((), device="cpu") if total is None else total / scale_of(plate)


def scale_of(plate: Plate | None) -> float:
    """N / B, 1 without a plate."""
    return 1.0 if plate is None else plate.full_size / plate.size


def check_sampled(terms: Terms) -> None:
    """Check that the guide draws all of its sites.

    Raises:
        ValueError: if it enumerates one.
    """
    if terms.enumerated:
        raise ValueError(
            "the guide enumerates its discrete latents, but importance weights need samples: "
            "remove config_enumerate or infer={'enumerate': ...} from the guide"
        )


def check_scales(scales: Mapping[str, Iterable[float | Tensor]], plate: Plate | None) -> None:
    """Check that only the plate over the data scales the densities.

    Raises:
        ValueError: for a site with another scale.
    """
    expected = scale_of(plate)
    for name, scale in ((name, scale) for name, both in scales.items() for scale in both):
        if not _is_scale(scale, expected):
            weighed = (
                "but no plate encloses all sites, and a weight covers all data together: that "
                "cannot be subsampled. Give it all data, or put every site into the plate over "
                "them"
                if plate is None
                else f"where plate {plate.name!r} gives {expected}: let only the plate over the "
                "data scale the densities in the weights, in model and guide"
            )
            raise ValueError(f"site {name!r} has its density scaled by {scale}, {weighed}")


def _is_scale(found: float | Tensor, expected: float) -> bool:
    """Whether a scale is as expected. A captured step does not read a tensor's value."""
    if not isinstance(found, Tensor):
        return math.isclose(found, expected, rel_tol=1e-6)
    return is_captured() or bool(((found - expected).abs() <= 1e-6 * expected).all())


def check_densities(latents: Mapping[str, Latent], plate: Plate) -> None:
    """Check that the densities belong to single data, times N / B in model and guide.

    Raises:
        ValueError: for a mask, and for another scale.
    """
    scale = plate.full_size / plate.size
    for key, latent in latents.items():
        parts = (*layers(latent.q), *layers(latent.p))
        if latent.is_masked or any(isinstance(d, MaskedDistribution) for d in parts):
            raise ValueError(
                f"site {key!r} is masked: its q(z) would include what the mask leaves out. Leave "
                "those rows out of the data"
            )
        for found in (latent.scale, latent.prior_scale):
            if found is not None and not _is_scale(found, scale):
                raise ValueError(
                    f"site {key!r} has its density scaled by {found}, where plate {plate.name!r} "
                    f"gives {scale}: let only the plate over the data scale it, in model and guide"
                )
