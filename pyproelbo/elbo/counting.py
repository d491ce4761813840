"""The number of training steps of an objective, kept in its state."""

from collections.abc import Mapping

from torch import nn


class CountsSteps(nn.Module):
    """A module whose state is the number of its training steps.

    Attributes:
        step: that number. The state of a Pyro objective has none, and leaves it unchanged.
    """

    step: int

    def get_extra_state(self) -> dict[str, int]:
        """This module's part of ``state_dict()``: the step."""
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Continue from a step.

        Raises:
            ValueError: for another state.
        """
        step = state.get("step") if isinstance(state, Mapping) else None
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(
                f"the state of a {type(self).__name__} should be {{'step': a whole number}}, got "
                f"{state!r}: without its '_extra_state' the step is unchanged"
            )
        self.step = step

    def count_step(self) -> None:
        """Count one training step."""
        object.__setattr__(self, "step", self.step + 1)  # nn.Module would look for parameters

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, object],
        prefix: str,
        local_metadata: Mapping[str, object],
        strict: bool,
        missing_keys: list[str],
        *args: object,
        **kwargs: object,
    ) -> None:
        """As torch's; without a state, as from Pyro's objectives, the step is unchanged."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs
        )
        if f"{prefix}_extra_state" in missing_keys:
            missing_keys.remove(f"{prefix}_extra_state")
