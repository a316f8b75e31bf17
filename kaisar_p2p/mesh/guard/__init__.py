"""Whom to let in and whom to part from: admission, accounts, pruning, two nodes with one key."""
