"""Inside `structured`: which parts of a network leave together, which units go, and the network without them."""

from lottery_tickets._structured._drawing import Drawing, units_of
from lottery_tickets._structured._ranking import Ranking, Rule
from lottery_tickets._structured._scores import Named, normalised

__all__ = ["Drawing", "Named", "Ranking", "Rule", "normalised", "units_of"]
