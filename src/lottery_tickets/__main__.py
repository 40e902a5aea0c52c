"""`python -m lottery_tickets`: the command line."""

from lottery_tickets.cli import main

if __name__ == "__main__":
    main()
