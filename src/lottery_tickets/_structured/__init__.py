"""Inside `structured`: which parts of a network leave together, which units go, and the network without them."""
