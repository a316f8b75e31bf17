"""The machine itself: what it says it has (`probe`), and proofs of what it can do (`prove`)."""
