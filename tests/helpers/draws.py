"""Guides whose draws of z are given, or kept."""

from pyro.poutine.messenger import Messenger


class Drawn(Messenger):
    """Takes z from a function of its distribution."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["value"], msg["done"] = self.draw(msg["fn"]), True


def at(guide, z):
    """A guide whose sample is z."""
    return Drawn(lambda q: z)(guide)


class Kept(Messenger):
    """Keeps every z that is drawn."""

    def __init__(self):
        super().__init__()
        self.draws = []

    def _pyro_post_sample(self, msg):
        if msg["name"] == "z":
            self.draws.append(msg["value"])
