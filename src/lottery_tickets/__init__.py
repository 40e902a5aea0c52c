"""Lottery tickets: sparse subnetworks that do as well as the whole network, found and judged exactly."""
