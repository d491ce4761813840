"""The particles of an objective: one by one, or at once where that changes none of them."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

from pyro.infer.util import is_validation_enabled

from pyproelbo._backend.captures import is_captured
from pyproelbo._backend.kept_samples import kept, restore, samples_forgotten
from pyproelbo._rows.several import may_be_at_once
from pyproelbo._terms.masked_latents import warn_of_masks
from pyproelbo._terms.sites import Sites
from pyproelbo._terms.traces import Program, Traces, run
from pyproelbo.elbo.known import Known


class Particles:
    """What has been found out about the programs that an objective has run."""

    def __init__(self) -> None:
        self._at_once, self._is_sequential = Known[bool](), Known[bool]()
        self._warned_of_masks = False

    def runs(
        self,
        model: Program,
        guide: Program,
        args: tuple,
        kwargs: dict,
        num: int,
        nesting: float,
        at_once: bool,
    ) -> Iterator[list[Traces]]:
        """The runs of looped particles one by one; of all at once if vectorised.

        Each run has one pair of traces, or one for each value that is enumerated sequentially.

        Args:
            num: how many particles.
            at_once: whether to run them at once, where that is correct.
            nesting: as ``max_plate_nesting`` of :func:`~pyproelbo._terms.traces.run`.
        """

        def of(num: int, nesting: float) -> list[Traces]:
            is_sequential = self._is_sequential.of(model, guide)
            runs = run(
                model,
                guide,
                args,
                kwargs,
                num_particles=num,
                max_plate_nesting=nesting,
                may_be_sequential=is_sequential is not False,
            )
            if is_sequential is None:
                self._is_sequential.put("sequential" in runs[0].enumerated, model, guide)
            return runs

        if at_once and num > 1:
            tried = partial(may_be_at_once, model, guide, args, kwargs)
            runs = self._runs_at_once(partial(of, num, nesting), tried, model, guide)
            if runs is not None:
                yield runs
                return
        for left in reversed(range(num)):
            with samples_forgotten() if left else nullcontext():  # so that each makes its own
                runs = of(1, nesting)
            nesting = runs[0].max_plate_nesting
            yield runs

    def _runs_at_once(
        self,
        runs_of_all: "partial[list[Traces]]",
        tried: "partial[bool]",
        model: Program,
        guide: Program,
    ) -> list[Traces] | None:
        """All particles in one run; None where they must be looped.

        Programs seen for the first time are tried after their run, which leaves random numbers as
        in Pyro.
        """
        found = self._at_once.of(model, guide)
        if found is False:
            return None
        if found or is_captured():  # by others, before any eager step
            return runs_of_all()
        before, runs, failed = kept(), None, None
        try:
            runs = runs_of_all()
        except Exception as error:  # whatever it is: a particle by itself need not have it
            failed = error
        found = self._at_once.put(tried(), model, guide)
        if found and failed is not None:
            raise failed
        if found:
            return runs
        restore(before)
        return None

    def look_at(self, traces: Traces, step: int) -> None:
        """Warn once of a latent that only the model, or only the guide, masks.

        Masks that are different tensors are compared only where Pyro's validation, which also reads
        numbers, is on, at steps 0, 1, 3, 7, ...
        """
        may_read = is_validation_enabled() and not is_captured()
        if may_read and not (self._warned_of_masks or step & (step + 1)):
            self._warned_of_masks = warn_of_masks(Sites.of(traces))
