"""The parts of `lottery_tickets.stability`."""
