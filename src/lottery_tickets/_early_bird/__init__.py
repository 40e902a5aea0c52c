"""The parts of the search for early-bird tickets."""
