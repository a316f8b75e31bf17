"""What peers say to each other, and what follows from it. Pure: no IO, clock or entropy."""
